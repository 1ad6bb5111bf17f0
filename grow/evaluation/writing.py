"""What a model writes after a prompt, and how near that is to a reference."""

from typing import Any

from tqdm import tqdm

from grow.template import Template

_AT_A_TIME = 16
_DRAWS = 1000


def write(model: Any, tokenizer: Any, template: Template, rows: Any) -> list[dict[str, str]]:
    """What the model writes, greedily, after each row's prompt, up to the line's end; with prompt and reference."""
    pieces = [template.pieces(row, tokenizer) for row in rows]
    prompts, wanted = ["".join(text for text, _ in row[:-1]) for row in pieces], [row[-1][0] for row in pieces]
    if not prompts:
        return []
    ends = [tokenizer.eos_token_id, *_line_end(tokenizer)]
    # Of about one length together: each batch is as long as its longest.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts: dict[int, str] = {}
    for first in tqdm(range(0, len(order), _AT_A_TIME), desc="writing", leave=False, disable=None):
        part = order[first : first + _AT_A_TIME]
        inputs = tokenizer(
            [prompts[i] for i in part],
            add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt",
        ).to(model.device)  # fmt: skip
        longest = 2 * max(len(ids) for ids in tokenizer([wanted[i] for i in part]).input_ids)
        written = model.generate(
            input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=longest, do_sample=False,
            eos_token_id=ends,
        )  # fmt: skip
        decoded = tokenizer.batch_decode(written[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        texts |= dict(zip(part, decoded, strict=True))
    return [
        {
            "prompt": prompt.removeprefix(tokenizer.bos_token or ""),
            "reference": reference.strip(),
            "output": (texts[index].strip() or "–").split("\n")[0],
        }
        for index, (prompt, reference) in enumerate(zip(prompts, wanted, strict=True))
    ]


def _line_end(tokenizer: Any) -> list[int]:
    """The token that ends a line, if it is one: what comes after it is not looked at."""
    ids = tokenizer("\n", add_special_tokens=False).input_ids
    return ids if len(ids) == 1 else []


def translation_scores(outputs: list[str], references: list[str]) -> dict[str, Any]:
    """chrF2 and BLEU of a corpus, 0 to 100, with 95 % bootstrap intervals, and sacrebleu's signatures (Post 2018)."""
    from sacrebleu.metrics import BLEU, CHRF

    found: dict[str, Any] = {"intervals": {}}
    for name, metric in (("chrf", CHRF()), ("bleu", BLEU())):
        figure = metric.corpus_score(outputs, [references], n_bootstrap=_DRAWS)
        found[name] = float(figure.score)
        middle, half = float(figure._mean), float(figure._ci)
        found["intervals"][name] = (middle - half, middle + half)
        found[f"{name}_signature"] = str(metric.get_signature())
    return found
