"""The peak memory of tuning and of an export beside the weights': a random Llama in bfloat16, made on disk."""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import transformers

from pipelines.gpu import decoder_spec, random_model
from rewriter import Session

# Of 1.45 billion parameters with 30 layers.
LLAMA = {
    "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32,
    "num_key_value_heads": 4, "max_position_embeddings": 2048, "pad_token_id": 0,
}  # fmt: skip
# The peak above what is there when everything is imported, of a command on a run's folder.
MEASURED = """
import json, pathlib, resource, sys
import rewriter.export.ship
from rewriter import Session
status = pathlib.Path("/proc/self/status").read_text()
imported = 1024 * int(status.split("VmRSS:")[1].split()[0])
run, settings = pathlib.Path(sys.argv[2]), sys.argv[3:]
if sys.argv[1] == "tuning":
    Session(run.parent / "spec.yaml", *settings).tune(run, overwrite=True)
else:
    Session(run / "spec.yaml").export(run)
print(json.dumps(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - imported))
"""
WHAT = ("tuning", "checkpoint", "onnx")
WRITTEN = {"checkpoint": "merged/*.safetensors", "onnx": "onnx/model_fp32.onnx*"}
SHORT = ("train.batch_size=2", "data.max_length=16", "data.limit={train: 8, validation: 4}", "model.dtype=bfloat16")


def factors(folder: Path, layers: int, what: Sequence[str] = WHAT) -> Iterator[tuple[str, float, float]]:
    """What, gigabytes of the weights, and the peak above imports over them: of tuning for two steps, less the planned
    activations and states; of the export of the checkpoint alone; and of that with the ONNX file, which is in float32.

    Args:
        folder: for the model and its runs, of which it takes seven times the weights; for tuning once.
        layers: of the model.
        what: of `WHAT`.
    """
    model = folder / "model"
    if not model.exists():
        random_model(model, transformers.LlamaConfig(num_hidden_layers=layers, dtype="bfloat16", **LLAMA))
    spec = decoder_spec(folder / "spec.yaml", model)
    for name in what:
        run, planned = folder / name, 0
        if name == "tuning":
            settings = ("train.max_steps=2", *SHORT)
            session = Session(spec, *settings)
            cost, size = session.cost(), session.plan().weight_bytes
            planned = cost.activations + cost.optimiser
        else:
            settings = ("train.max_steps=1", "export.variants=null", *SHORT, *["export.onnx=null"][name == "onnx" :])
            if not (run / "metrics.json").exists():
                Session(spec, *settings).tune(run)
        line = [sys.executable, "-c", MEASURED, name, str(run), *settings]
        peak = int(subprocess.run(line, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        if name != "tuning":
            size = sum(file.stat().st_size for file in run.glob(WRITTEN[name]))
        yield name, size / 1e9, (peak - planned) / size
