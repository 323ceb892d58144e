"""The peak memory of an export beside the bytes of the weights: a random Llama in bfloat16, made on disk."""

import subprocess
import sys
from pathlib import Path

import transformers

from pipelines.gpu import decoder_spec, random_model
from rewriter import Session

# Of 1.45 billion parameters with 30 layers.
LLAMA = {
    "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32,
    "num_key_value_heads": 4, "max_position_embeddings": 2048, "pad_token_id": 0,
}  # fmt: skip
MEASURED = """
import json, pathlib, resource, sys
import rewriter.export.ship
from rewriter import Session
status = pathlib.Path("/proc/self/status").read_text()
imported = 1024 * int(status.split("VmRSS:")[1].split()[0])
run = pathlib.Path(sys.argv[1])
Session(run / "spec.yaml").export(run)
print(json.dumps(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - imported))
"""


def factors(folder: Path, layers: int) -> dict[str, tuple[float, float]]:
    """Gigabytes of the weights that are written, and the peak above imports over them: of the checkpoint alone, and
    of the ONNX file, which is in float32, behind it.

    Args:
        folder: for the model and its runs, of which it takes seven times the weights.
        layers: of the model.
    """
    model = folder / "model"
    if not model.exists():
        random_model(model, transformers.LlamaConfig(num_hidden_layers=layers, dtype="bfloat16", **LLAMA))
    spec = decoder_spec(folder / "spec.yaml", model)
    short = ("train.max_steps=1", "train.batch_size=2", "data.max_length=16", "data.limit={train: 8, validation: 4}")
    found, written = {}, {"checkpoint": "merged/*.safetensors", "onnx": "onnx/model_fp32.onnx*"}
    for name, more in {"checkpoint": ["export.onnx=null"], "onnx": []}.items():
        run = folder / name
        if not (run / "metrics.json").exists():
            Session(spec, "model.dtype=bfloat16", "export.variants=null", *short, *more).tune(run)
        done = subprocess.run([sys.executable, "-c", MEASURED, run], check=True, capture_output=True, text=True)
        size = sum(file.stat().st_size for file in run.glob(written[name]))
        found[name] = size / 1e9, int(done.stdout.splitlines()[-1]) / size
    return found
