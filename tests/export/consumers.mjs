// Answers of transformers.js: node consumers.mjs FOLDER TASK TEXT... prints JSON; files are read from FOLDER alone.
import path from 'node:path'
import { env, pipeline } from '@huggingface/transformers'

const [folder, task, ...texts] = process.argv.slice(2)
env.allowRemoteModels = false
env.localModelPath = path.dirname(folder) + '/'
const ask = await pipeline(task, path.basename(folder), { dtype: 'fp32', device: 'cpu' })
const options = {
  'feature-extraction': { pooling: 'mean', normalize: true },
  'text-classification': { top_k: null },
  'text-generation': { max_new_tokens: 8, do_sample: false, return_full_text: false, add_special_tokens: true },
}[task]
const found = await ask(task === 'text-generation' ? texts[0] : texts, options)
console.log(JSON.stringify(task === 'feature-extraction' ? found.tolist() : found))
