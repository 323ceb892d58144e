// What a pipeline of transformers.js says of texts, as a value that JSON takes.
const OPTIONS = {
  'feature-extraction': { pooling: 'mean', normalize: true },
  'text-classification': { top_k: null },
  'text-generation': { max_new_tokens: 8, do_sample: false, return_full_text: false, add_special_tokens: true },
}

export async function answers(pipeline, folder, task, texts, device) {
  const ask = await pipeline(task, folder, { dtype: 'fp32', device })
  const found = await ask(task === 'text-generation' ? texts[0] : texts, OPTIONS[task])
  return task === 'feature-extraction' ? found.tolist() : found
}
