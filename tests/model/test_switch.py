"""A switch that is off leaves the base, bit for bit, however the model is run; on, it leaves the grown model."""

import copy
import threading
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import grow
from grow.checkpoint.switch_record import SwitchRecord
from grow.data.examples import all_learnt
from grow.data.packing import PackedDataset, collate
from grow.errors import UserError
from grow.model.grown import grown_mlps
from grow.model.layouts import decoder_mlps
from grow.model.loading import load, load_lora
from grow.model.loss import labelled_logits
from grow.model.switched import by_decision, put_switch, set_switch
from tests.helpers.tiny import make_base

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
GROWN = ["2,3", "all", "queries all", pytest.param("heads all", marks=pytest.mark.full)]
# The multimodal class, beside test_rows_that_are_off_are_the_base, with --full.
EACH = ["text", pytest.param("multimodal", marks=pytest.mark.full)]
PROMPTS = torch.randint(0, 256, (6, 12), generator=torch.Generator().manual_seed(3))
GENERATE: dict[str, Any] = {"max_new_tokens": 6, "pad_token_id": 256, "eos_token_id": None}


def base_of(path: Path, dtype: torch.dtype) -> Any:
    # Frozen, as all models here are: of a head that is not, torch multiplies a last token's slice by another kernel.
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval().requires_grad_(False)


def trained(path: Path, dtype: torch.dtype, layers: str = "2,3", method: str = "g_freeze") -> Any:
    """A grown model whose growth has moved far. Of "queries 1,2" and the like heads of attention have grown."""
    kind, _, where = layers.rpartition(" ")
    how = {"layers": "none", "attention": kind, "attention_layers": where} if kind else {"layers": layers}
    model = grow.grow_model(base_of(path, dtype), **how)
    generator = torch.Generator().manual_seed(0)
    for parameter in grow.trainable(model, method):
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator).to(dtype)
    return model.eval().requires_grad_(False)


def features(path: Path, layer: int, prompts: torch.Tensor, decay: float = 0.5) -> torch.Tensor:
    """The mean of the inputs of a layer's MLP over the last eight tokens, each weighing half of the next, [B, H]
    fp32."""
    base, seen = base_of(path, torch.float32), []
    decoder_mlps(base)[layer].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].float()))
    with torch.no_grad():
        base(prompts)
    last = seen[0][:, -8:]
    weight = decay ** torch.arange(last.shape[1] - 1.0, -1, -1)
    return (last * weight[:, None]).sum(1) / weight.sum()


def record_for(path: Path, layer: int, prompts: torch.Tensor = PROMPTS, kind: str = "row") -> SwitchRecord:
    """A switch that is on for half of the prompts: those whose first feature is large."""
    decay = 0.0 if kind == "token" else 0.5
    found = features(path, layer, prompts, decay)
    weight = torch.zeros(found.shape[1])
    weight[int(found.std(0).argmax())] = 1.0
    scores = (found @ weight).sort().values
    middle = len(scores) // 2
    return SwitchRecord(kind, layer, weight.numpy(), float(scores[middle - 1 : middle + 1].mean()), decay)


def on_of(path: Path, record: SwitchRecord, prompts: torch.Tensor = PROMPTS) -> torch.Tensor:
    on = features(path, record.layer, prompts, record.decay) @ torch.from_numpy(record.weight) > record.threshold
    assert on.any() and not on.all()
    return on


def three(path: Path, dtype: torch.dtype, record: SwitchRecord, **how: Any) -> tuple[Any, Any, Any]:
    """The base, the grown model without a switch, and with it."""
    switched = trained(path, dtype, **how)
    put_switch(switched, record)
    return base_of(path, dtype), trained(path, dtype, **how), switched


@torch.no_grad()
def run(model: Any, **inputs: Any) -> torch.Tensor:
    return model(**inputs).logits


@pytest.fixture(scope="module", params=EACH)
def each_base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / request.param, request.param)


@BOTH
@pytest.mark.parametrize("method", ["g_freeze", "g_train"])
@pytest.mark.parametrize("layers", [*GROWN[:3], "heads all", "heads 3"])
def test_rows_that_are_off_are_the_base(tiny_base: Path, dtype: torch.dtype, method: str, layers: str) -> None:
    """In one batch with rows that are on; with all layers grown a first pass of the base decides."""
    record = record_for(tiny_base, 2)
    on = on_of(tiny_base, record)
    base, grown, switched = three(tiny_base, dtype, record, layers=layers, method=method)
    expected, full = run(base, input_ids=PROMPTS), run(grown, input_ids=PROMPTS)
    found = run(switched, input_ids=PROMPTS)
    assert torch.equal(switched.switched, on)
    assert torch.equal(found[~on], expected[~on])
    assert torch.allclose(found[on].float(), full[on].float(), atol=0.2 if dtype == torch.bfloat16 else 1e-4)
    assert not torch.equal(full[~on], expected[~on]) and not torch.equal(found[on], expected[on])
    for rows, other in ((on, full), (~on, expected)):  # alone, they are what they are without a switch
        alone = run(switched, input_ids=PROMPTS[rows])
        reference = run(grown if other is full else base, input_ids=PROMPTS[rows])
        assert torch.equal(alone, reference)


@BOTH
def test_modes_and_alpha(each_base: Path, dtype: torch.dtype) -> None:
    record = record_for(each_base, 2)
    base, grown, switched = three(each_base, dtype, record)
    set_switch(switched, "on")
    assert torch.equal(run(switched, input_ids=PROMPTS), run(grown, input_ids=PROMPTS))
    set_switch(switched, "off")
    assert torch.equal(run(switched, input_ids=PROMPTS), run(base, input_ids=PROMPTS))
    set_switch(switched, "auto")
    on = on_of(each_base, record)
    for model in (grown, switched):
        grow.set_alpha(model, 0.5)
    found = run(switched, input_ids=PROMPTS[on])
    assert torch.equal(found, run(grown, input_ids=PROMPTS[on]))
    grow.set_alpha(switched, 0)
    assert torch.equal(run(switched, input_ids=PROMPTS), run(base, input_ids=PROMPTS))
    with pytest.raises(UserError, match="auto, on, off"):
        set_switch(switched, "maybe")
    with pytest.raises(UserError, match="has no switch"):
        set_switch(grown, "on")


def padded(left: bool) -> dict[str, torch.Tensor]:
    """The prompts, shortened by up to five tokens at their beginning and padded again."""
    ids, mask = torch.full((6, 12), 256), torch.zeros(6, 12, dtype=torch.int64)
    for index, prompt in enumerate(PROMPTS):
        kept = prompt[index:]
        place = slice(index, 12) if left else slice(0, 12 - index)
        ids[index, place], mask[index, place] = kept, 1
    return {"input_ids": ids, "attention_mask": mask}


@BOTH
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("layers", GROWN)
def test_padding(each_base: Path, dtype: torch.dtype, left: bool, layers: str) -> None:
    """The last token that is not padding decides."""
    last = torch.cat([features(each_base, 2, prompt[None, index:]) for index, prompt in enumerate(PROMPTS)])
    record = record_for(each_base, 2)
    scores = last @ torch.from_numpy(record.weight)
    record = SwitchRecord("row", 2, record.weight, float(scores.sort().values[2:4].mean()), record.decay)
    base, _, switched = three(each_base, dtype, record, layers=layers)
    inputs = padded(left)
    found = run(switched, **inputs)
    on = scores > record.threshold
    assert torch.equal(switched.switched, on)
    there = inputs["attention_mask"].bool()
    off = there & ~on[:, None]
    assert torch.equal(found[off], run(base, **inputs)[off])


@BOTH
@pytest.mark.parametrize("layers", GROWN)
def test_packed_rows(each_base: Path, dtype: torch.dtype, layers: str) -> None:
    """Each row of a packed sequence is decided by itself, before its first label, or at its last token without."""
    record = record_for(each_base, 2)
    on = on_of(each_base, record)
    base, grown, switched = three(each_base, dtype, record, layers=layers)
    rows = [[*prompt.tolist(), 7, 8, 9] for prompt in PROMPTS]
    examples = all_learnt(rows)
    examples.drop_labels(torch.tensor([place % 14 < 11 for place in range(6 * 14)]).numpy())
    batch = collate(list(PackedDataset(examples, 32, 256)))
    assert (batch["rows"] == -1).any(), "there is padding"
    labelled = batch["rows"][batch["labels"] != -100]
    with torch.no_grad():
        expected, _ = labelled_logits(base, batch)
        full, _ = labelled_logits(grown, batch)
        found, _ = labelled_logits(switched, batch)
    is_on = on[labelled]
    assert torch.equal(found[~is_on], expected[~is_on])
    assert torch.allclose(found[is_on].float(), full[is_on].float(), atol=0.2 if dtype == torch.bfloat16 else 1e-4)
    without = {"input_ids": PROMPTS.view(2, 36), "position_ids": torch.arange(12).repeat(2, 3)}
    found, expected = (run(model, **without, use_cache=False).view(6, 12, -1) for model in (switched, base))
    assert torch.equal(switched.switched, on) and torch.equal(found[~on], expected[~on])
    labels = torch.full((6, 15), -100)
    labels[:, 12:] = 7
    whole = torch.tensor(rows)
    run(switched, input_ids=whole, labels=labels)  # as transformers has them: labels[t] is token t
    assert torch.equal(switched.switched, on)


GENERATIONS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "static": {"do_sample": False, "cache_implementation": "static"},
    "without a cache": {"do_sample": False, "use_cache": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 0},
    "several": {"do_sample": True, "num_return_sequences": 2, "top_k": 0},
}


@BOTH
@pytest.mark.parametrize("how", GENERATIONS)
@pytest.mark.parametrize("layers", GROWN)
def test_generate(each_base: Path, dtype: torch.dtype, how: str, layers: str) -> None:
    """What is decided at the prompt holds to the answer's end, left padding included."""
    record = record_for(each_base, 2)
    base, grown, switched = three(each_base, dtype, record, layers=layers)
    inputs = padded(left=True)
    options = GENERATE | GENERATIONS[how] | {"output_scores": True, "return_dict_in_generate": True}

    def written(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        out = model.generate(**inputs, **options)
        return out.sequences[:, 12:].reshape(6, -1), torch.stack(out.scores, 1)

    (base_ids, base_scores), (grown_ids, _), (ids, scores) = map(written, (base, grown, switched))
    on = switched.switched
    several = len(scores) // 6
    scores, base_scores = scores[::several], base_scores[::several]
    assert on.shape == (6,) and on.any() and not on.all()
    steps = 1 if options["do_sample"] else None  # later ones continue what was drawn for all rows together
    assert torch.equal(scores[~on][:, :steps], base_scores[~on][:, :steps])
    if not options["do_sample"]:
        assert torch.equal(ids[~on], base_ids[~on])
        if dtype == torch.float32:
            assert torch.equal(ids[on], grown_ids[on])
    assert not torch.equal(base_ids, grown_ids)


@pytest.mark.parametrize("layers", GROWN)
@pytest.mark.parametrize("how", [{"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 5}, {"min_new_tokens": 6}])
def test_guesses_and_chunks(each_base: Path, layers: str, how: dict[str, Any]) -> None:
    """The prompt's last token decides, also where guesses follow it in the first pass, or where that is one part."""
    record = record_for(each_base, 2)
    on = on_of(each_base, record)
    base, grown, switched = three(each_base, torch.float32, record, layers=layers)
    for row, prompt in enumerate(PROMPTS):
        prompt = prompt[None]
        other = grown if on[row] else base
        expected = other.generate(prompt, **GENERATE, do_sample=False)
        found = switched.generate(prompt, attention_mask=torch.ones_like(prompt), **GENERATE, do_sample=False, **how)
        assert switched.switched.tolist() == [bool(on[row])] and torch.equal(found, expected)


def test_generate_of_one_kind(each_base: Path) -> None:
    """A batch that is off writes what the base writes, sampled too."""
    record = record_for(each_base, 2)
    on = on_of(each_base, record)
    base, grown, switched = three(each_base, torch.float32, record)
    for rows, other in ((~on, base), (on, grown)):
        said = []
        for model in (other, switched):
            torch.manual_seed(1)
            said.append(model.generate(PROMPTS[rows], **GENERATE, do_sample=True, top_k=0))
        assert torch.equal(*said)


@pytest.mark.parametrize("layers", GROWN)
@pytest.mark.parametrize("kind", ["row", "answer"])
def test_turns_of_a_conversation(text_base: Path, layers: str, kind: str) -> None:
    """Each prompt decides anew; where that changes, a cache that was kept is filled again."""
    record = record_for(text_base, 2, kind=kind)
    on = on_of(text_base, record)
    base, _, switched = three(text_base, torch.float32, record, layers=layers)
    first, second = PROMPTS[on][:1], PROMPTS[~on][:1]
    cache = DynamicCache(config=switched.config)
    answer = switched.generate(first, past_key_values=cache, **GENERATE, do_sample=False)
    assert switched.switched.tolist() == [True]
    prompt = torch.cat((answer, second), 1)
    threshold = features(text_base, 2, prompt) @ torch.from_numpy(record.weight)
    switched.switch.record = SwitchRecord(kind, 2, record.weight, float(threshold) + 1, record.decay)
    answer = switched.generate(prompt, past_key_values=cache, **GENERATE, do_sample=False)
    assert switched.switched.tolist() == [False]
    assert torch.equal(answer, base.generate(prompt, **GENERATE, do_sample=False)), "after a turn that was on"
    kept = cache.get_seq_length()
    third = torch.cat((answer, second), 1)
    passes: list[int] = []
    switched.register_forward_pre_hook(
        lambda _, __, kwargs: passes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    answer = switched.generate(third, past_key_values=cache, **GENERATE, do_sample=False)
    if switched.switched.tolist() == [False]:
        assert torch.equal(answer, base.generate(third, **GENERATE, do_sample=False))
        assert third.shape[1] - kept in passes, "the cache was kept"


SOME = pytest.mark.parametrize("layers", ["2,3", "queries 3", "heads 3"])


@BOTH
@SOME
@pytest.mark.parametrize("method", ["g_freeze", "g_train"])
def test_answer(each_base: Path, dtype: torch.dtype, layers: str, method: str) -> None:
    """On from the last token of the prompt: all tokens before it are the base's."""
    record = record_for(each_base, 2, kind="answer")
    on = on_of(each_base, record)
    base, _, switched = three(each_base, dtype, record, layers=layers, method=method)
    found, expected = (run(model, input_ids=PROMPTS) for model in (switched, base))
    assert torch.equal(found[~on], expected[~on]) and torch.equal(found[:, :-1], expected[:, :-1])
    assert not torch.equal(found[on, -1], expected[on, -1])
    cached = switched.generate(PROMPTS, **GENERATE, do_sample=False)
    if dtype == torch.float32:
        assert torch.equal(cached, switched.generate(PROMPTS, **GENERATE, do_sample=False, use_cache=False))


@BOTH
@SOME
def test_each_token(each_base: Path, dtype: torch.dtype, layers: str) -> None:
    """A token is the base's as long as no earlier one of its sequence was on."""
    record = record_for(each_base, 2, kind="token")
    base, _, switched = three(each_base, dtype, record, layers=layers)
    found, expected = (run(model, input_ids=PROMPTS) for model in (switched, base))
    on = switched.switched
    assert on.shape == PROMPTS.shape and on.any() and not on.all()
    before = on.long().cumsum(1) == 0
    assert torch.equal(found[before], expected[before]) and not torch.equal(found[~before], expected[~before])
    with pytest.raises(UserError, match="lowest layer whose MLP grows"):
        put_switch(trained(each_base, dtype, layers="all"), record)


CALL = (3, 4)


@BOTH
@pytest.mark.parametrize("layers", ["all", "queries all", "heads all"])
def test_call(each_base: Path, dtype: torch.dtype, layers: str) -> None:
    """On from the last place where the call stands in the prompt; also while the model trains."""
    record = SwitchRecord("call", tokens=CALL)
    prompts = PROMPTS.clone()
    prompts[:, 5:7] = torch.tensor(CALL)
    prompts[3:, 5] = 5
    prompts[0, 1:3] = torch.tensor(CALL)  # an earlier one
    base, _, switched = three(each_base, dtype, record, layers=layers, method="g_train")
    expected = run(base, input_ids=prompts)
    for mode in (switched.eval, switched.train):
        found = run(mode(), input_ids=prompts)
        assert switched.switched.tolist() == [True] * 3 + [False] * 3
        assert torch.equal(found[3:], expected[3:]) and torch.equal(found[:3, :5], expected[:3, :5])
        assert not torch.equal(found[:3, 5], expected[:3, 5])
    switched.eval()
    cached = switched.generate(prompts, **GENERATE, do_sample=False)
    assert torch.equal(cached[3:], base.generate(prompts, **GENERATE, do_sample=False)[3:])
    if dtype == torch.float32:  # in bf16 tokens may be a tie
        assert torch.equal(cached, switched.generate(prompts, **GENERATE, do_sample=False, use_cache=False))


def test_training_is_always_on(text_base: Path) -> None:
    record = record_for(text_base, 2)
    _, grown, switched = three(text_base, torch.float32, record)
    assert torch.equal(run(switched.train(), input_ids=PROMPTS), run(grown.train(), input_ids=PROMPTS))


def test_a_copy_decides_for_itself(text_base: Path) -> None:
    record = record_for(text_base, 2)
    on = on_of(text_base, record)
    base, _, switched = three(text_base, torch.float32, record)
    copied = copy.deepcopy(switched)
    set_switch(switched, "on")
    found = run(copied, input_ids=PROMPTS)
    assert torch.equal(copied.switched, on) and switched.switched is None
    assert torch.equal(found[~on], run(base, input_ids=PROMPTS)[~on])


@torch.no_grad()
def test_a_loop_of_ones_own(text_base: Path) -> None:
    """A KV cache carries with what it was filled: through a copy, a choice of rows, another order, tuples."""
    record = record_for(text_base, 2)
    on = on_of(text_base, record)
    base, grown, switched = three(text_base, torch.float32, record)
    both = torch.stack((PROMPTS[on][0], PROMPTS[~on][0]))
    step = torch.tensor([[5], [6]])

    def filled(model: Any) -> DynamicCache:
        cache = DynamicCache(config=model.config)
        model(both, past_key_values=cache)
        return cache

    expected = [model(step, past_key_values=filled(model)).logits for model in (grown, base)]
    reference = torch.cat((expected[0][:1], expected[1][1:]))
    assert torch.allclose(switched(step, past_key_values=filled(switched)).logits, reference, atol=1e-4)
    copied = copy.deepcopy(filled(switched))
    assert torch.allclose(switched(step, past_key_values=copied).logits, reference, atol=1e-4)
    chosen = filled(switched)
    chosen.batch_select_indices(torch.tensor([1]))
    assert torch.allclose(switched(step[1:], past_key_values=chosen).logits, reference[1:], atol=1e-4)
    assert switched.switched.tolist() == [False]
    turned = filled(switched)
    turned.reorder_cache(torch.tensor([1, 0]))
    found = switched(step.flip(0), past_key_values=turned).logits
    assert switched.switched.tolist() == [False, True] and torch.allclose(found, reference.flip(0), atol=1e-4)
    _, cache = switched(both, return_dict=False, use_cache=True)[:2]
    switched(step, past_key_values=cache)
    assert switched.switched.tolist() == [True, False]
    cache = DynamicCache(config=base.config)
    base(both, past_key_values=cache)
    with pytest.raises(UserError, match="with which decision"):
        switched(step, past_key_values=cache)
    embeds = switched.get_input_embeddings()(both)
    switched(inputs_embeds=embeds)
    assert switched.switched.tolist() == [True, False]


@torch.no_grad()
def test_what_did_act_is_what_it_says(text_base: Path) -> None:
    """In each mode; and what does not pass through the model's forward is the base's."""
    record = record_for(text_base, 2)
    base, _, switched = three(text_base, torch.float32, record)
    assert torch.equal(switched.model(PROMPTS)[0], base.model(PROMPTS)[0])
    for mode in ("on", "off"):
        set_switch(switched, mode)
        switched(PROMPTS)
        assert switched.switched.tolist() == [mode == "on"] * 6
    set_switch(switched, "auto")
    switched(PROMPTS)
    assert torch.equal(switched.model(PROMPTS)[0], base.model(PROMPTS)[0]), "whatever the last pass decided"
    switched.train()(PROMPTS)
    assert switched.switched is None
    assert type(switched).__name__ == type(base).__name__, "which transformers writes to config.json"


@torch.no_grad()
@pytest.mark.parametrize("kind", ["row", "answer", "token"])
def test_a_mode_that_changes_between_uses_of_a_cache(text_base: Path, kind: str) -> None:
    """`generate` fills it again; a loop of one's own is told."""
    record = record_for(text_base, 2, kind=kind)
    base, _, switched = three(text_base, torch.float32, record)
    cache, prompt = DynamicCache(config=switched.config), PROMPTS[:1]
    for mode in ("on", "off", "auto", "on", "auto", "off"):
        set_switch(switched, mode)
        answer = switched.generate(prompt, past_key_values=cache, **GENERATE, do_sample=False)
        afresh = switched.generate(prompt, **GENERATE, do_sample=False)
        assert torch.equal(answer, afresh), mode
        if mode == "off":
            assert torch.equal(answer, base.generate(prompt, **GENERATE, do_sample=False))
        prompt = torch.cat((answer, PROMPTS[1:2]), 1)
    for first, then in (("on", "off"), ("off", "on"), ("on", "auto"), ("auto", "on")):
        if (first, then) == ("on", "auto") and kind != "token":
            continue  # it is what rows that are on would have been filled with
        cache = DynamicCache(config=switched.config)
        set_switch(switched, first)
        switched(PROMPTS, past_key_values=cache)
        set_switch(switched, then)
        with pytest.raises(UserError, match="start from an empty one"):
            switched(PROMPTS, past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("mask", ["ones", "padded", "blocks"])
def test_packed_rows_with_a_mask(text_base: Path, mask: str) -> None:
    """Where positions restart there is a row, whatever the mask; padding before or between makes none."""
    record = record_for(text_base, 2)
    on = on_of(text_base, record)
    base, _, switched = three(text_base, torch.float32, record)
    ids = PROMPTS.view(3, 24)
    positions, there = torch.arange(12).repeat(3, 2), torch.ones(3, 24, dtype=torch.long)
    if mask == "padded":
        padding = torch.zeros(3, 2, dtype=torch.long)
        ids, there = torch.cat((padding, ids), 1), torch.cat((padding, there), 1)
        positions = torch.cat((padding, positions), 1)
    inputs: dict[str, Any] = {"input_ids": ids, "position_ids": positions, "attention_mask": there, "use_cache": False}
    if mask == "blocks":
        row = torch.arange(24) // 12
        blocks = (row[:, None] == row[None]) & torch.ones(24, 24, dtype=torch.bool).tril()
        inputs["attention_mask"] = blocks.expand(3, 1, 24, 24)
    found, expected = (run(model, **inputs)[:, -24:].reshape(6, 12, -1) for model in (switched, base))
    decided = switched.switched
    assert decided.shape == (6,) and decided.any() and not decided.all()
    assert mask != "blocks" or torch.equal(decided, on)
    apart = torch.ones(6, dtype=torch.bool) if mask == "blocks" else torch.arange(6) % 2 == 0
    off = ~decided & apart  # else it attends to the row before it, which may be on
    assert off.any() and torch.equal(found[off], expected[off])
    assert not torch.equal(found[decided], expected[decided])


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
def test_passes_inside_generate(text_base: Path, use_cache: bool) -> None:
    """Code that generate calls may run the model on something else, or generate with it."""
    record = record_for(text_base, 2)
    on = on_of(text_base, record)
    base, grown, switched = three(text_base, torch.float32, record)
    yes, no = PROMPTS[on][:1], PROMPTS[~on][:1]
    seen: list[bool] = []

    def look(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(torch.equal(switched(no, use_cache=False).logits, base(no, use_cache=False).logits))
        seen.append(torch.equal(*(m.generate(no, **GENERATE, do_sample=False) for m in (switched, base))))
        cache = DynamicCache(config=switched.config)
        switched(no, past_key_values=cache)
        switched(no[:, :1], past_key_values=cache)
        seen.append(switched.switched.tolist() == [False])
        return scores

    options: dict[str, Any] = GENERATE | {"do_sample": False, "use_cache": use_cache}
    found = switched.generate(yes, logits_processor=[look], **options)
    assert switched.switched.tolist() == [True]
    assert torch.equal(found, grown.generate(yes, **options))
    assert all(seen) and len(seen) > 3


@torch.no_grad()
def test_after_a_pass_that_failed(text_base: Path) -> None:
    record = record_for(text_base, 2)
    base, _, switched = three(text_base, torch.float32, record)
    handle = switched.model.layers[3].register_forward_pre_hook(lambda *_: 1 / 0)
    set_switch(switched, "on")
    with pytest.raises(ZeroDivisionError):
        switched(PROMPTS)
    handle.remove()
    assert torch.equal(switched.model(PROMPTS)[0], base.model(PROMPTS)[0])


@torch.no_grad()
def test_one_thread_at_a_time(text_base: Path) -> None:
    """A second one is told; one after the other may use it."""
    record = record_for(text_base, 2)
    _, _, switched = three(text_base, torch.float32, record)
    said: list[BaseException | None] = []

    def other() -> None:
        try:
            switched(PROMPTS)
            said.append(None)
        except UserError as error:
            said.append(error)

    def in_a_thread() -> None:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    handle = switched.model.layers[3].register_forward_pre_hook(lambda *_: in_a_thread() if len(said) < 1 else None)
    expected = run(switched, input_ids=PROMPTS)
    handle.remove()
    assert "two threads" in str(said[0]) and torch.equal(run(switched, input_ids=PROMPTS), expected)
    in_a_thread()
    assert said[1] is None and torch.equal(run(switched, input_ids=PROMPTS), expected)


@torch.no_grad()
def test_it_leaves_out_what_peft_leaves_out(text_base: Path, tmp_path: Path) -> None:
    """PEFT's own way to leave an adapter out for some rows, `adapter_names`, with what the switch decides."""
    record = record_for(text_base, 2)
    on = on_of(text_base, record)
    model = peft.get_peft_model(
        load(text_base, torch.float32),
        peft.LoraConfig(target_modules=r".*layers\.[23]\..*_proj", task_type="CAUSAL_LM"),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(tmp_path / "lora")
    names = ["default" if is_on else "__base__" for is_on in on]
    expected = model.eval()(input_ids=PROMPTS, adapter_names=names).logits
    switched = load_lora(tmp_path / "lora", torch.float32, base=str(text_base))
    put_switch(switched, record)
    found = run(switched, input_ids=PROMPTS)
    assert torch.equal(switched.switched, on)
    torch.testing.assert_close(found, expected)
    base = run(load(text_base, torch.float32), input_ids=PROMPTS)
    assert torch.equal(found[~on], base[~on]) and (found[on] - base[on]).abs().max() > 0.1


def test_batches_without_rows_are_refused(text_base: Path) -> None:
    _, _, switched = three(text_base, torch.float32, record_for(text_base, 2))
    with pytest.raises(UserError, match="use generate"):
        switched.generate_batch(PROMPTS.tolist())


def test_whole_rows_are_decided_at_their_prompts(text_base: Path) -> None:
    """As lm-eval hands them over."""
    record = record_for(text_base, 2)
    on = on_of(text_base, record)
    base, grown, switched = three(text_base, torch.float32, record)
    rows = [(prompt.tolist(), [7, 8, 9, index]) for index, prompt in enumerate(PROMPTS)]

    def score(model: Any) -> Any:
        return lambda part: [run(model, input_ids=torch.tensor([ids + more])) for ids, more in part]

    found = by_decision(switched, rows, lambda row: row[0], score(switched))
    assert by_decision(base, rows, lambda row: row[0], score(base))[0].shape == found[0].shape
    for row, logits in enumerate(found):
        assert torch.equal(logits, score(grown if on[row] else base)([rows[row]])[0])
    assert switched.switch.mode == "auto"


def test_it_must_fit(text_base: Path) -> None:
    record, model = record_for(text_base, 2), trained(text_base, torch.float32)
    with pytest.raises(UserError, match="reads layer 9"):
        put_switch(model, SwitchRecord("row", 9, record.weight, 0.0))
    with pytest.raises(UserError, match="reads 3 features"):
        put_switch(model, SwitchRecord("row", 2, record.weight[:3], 0.0))
    assert all(mlp.switch is None for mlp in grown_mlps(model))


@pytest.mark.full
@BOTH
@pytest.mark.parametrize("layers", ["upper", "all", "queries all", "heads upper"])
def test_on_the_real_270m(real_base: Path, dtype: torch.dtype, layers: str) -> None:
    """Forward, packed and generated, rows that are off are the base's, whatever else is in the batch."""
    record = record_for(real_base, 6)
    on = on_of(real_base, record)
    base, _, switched = three(real_base, dtype, record, layers=layers)
    expected, found = run(base, input_ids=PROMPTS), run(switched, input_ids=PROMPTS)
    assert torch.equal(switched.switched, on)
    assert torch.equal(found[~on], expected[~on]) and not torch.equal(found[on], expected[on])
    packed = {"input_ids": PROMPTS.view(2, 36), "position_ids": torch.arange(12).repeat(2, 3)}
    found, expected = (run(model, **packed, use_cache=False).view(6, 12, -1) for model in (switched, base))
    assert torch.equal(found[~on], expected[~on])
    inputs, options = padded(left=True), GENERATE | {"do_sample": False, "pad_token_id": 0}
    for more in ({}, {"num_beams": 2}, {"use_cache": False}):
        written = [model.generate(**inputs, **options, **more)[:, 12:] for model in (switched, base)]
        off = ~switched.switched
        assert off.any() and torch.equal(written[0][off], written[1][off])
