// Answers of transformers.js: node consumers.mjs FOLDER TASK TEXT... prints JSON; files are read from FOLDER alone.
import path from 'node:path'
import { env, pipeline } from '@huggingface/transformers'
import { answers } from './ask.mjs'

const [folder, task, ...texts] = process.argv.slice(2)
env.allowRemoteModels = false
env.localModelPath = path.dirname(folder) + '/'
console.log(JSON.stringify(await answers(pipeline, path.basename(folder), task, texts, 'cpu')))
