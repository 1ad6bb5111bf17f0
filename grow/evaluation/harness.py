"""EleutherAI's lm-evaluation-harness runs on a model in memory, stock or grown: WinoGrande, ARC, HellaSwag, MMLU and
others.

Tasks are its own, or files of a local folder; if the data are in such a folder too, no network is needed.
"""

import logging
import os
from typing import Any

from grow.errors import UserError
from grow.evaluation.bootstrap import interval
from grow.model.switched import by_decision


class Harness:
    """Runs some tasks of the harness, which are looked up before any model is loaded.

    `include_path` is a folder of more tasks, `limit` takes the first rows of each. Raises UserError where the harness
    is not installed, a task is not known, or there is no such folder.
    """

    def __init__(self, tasks: list[str], include_path: str = "", limit: int | None = None, batch_size: int = 4):
        self.tasks, self.limit, self.batch_size = tasks, limit, batch_size
        if include_path and not os.path.isdir(include_path):
            raise UserError(f"--include-path {include_path}: no such folder")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise UserError(f"--lm-eval: lm_eval is missing ({error}); pip install -r requirements.txt") from None
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        # Its own tasks are thousands of files: they are read only if one is asked for.
        self.manager: Any = TaskManager(include_path=include_path, include_defaults=False) if include_path else None
        if self.manager is None or self._unknown():
            self.manager = TaskManager(include_path=include_path or None)
        if self._unknown():
            where = f" nor of {include_path}" if include_path else "; tasks of your own: --include-path FOLDER"
            raise UserError(f"--lm-eval: {self._unknown()[0]} is not a task of lm_eval{where}")

    def _unknown(self) -> list[str]:
        return [task for task in self.tasks if not self.manager.match_tasks([task])]

    def scores(self, model: Any, tokenizer: Any) -> dict[str, Any]:
        """Returns each task's metrics: {task: {metric: {"value", "interval", "rows"}}}.

        The interval is the bootstrap's over rows where the metric is a mean of them; else 1.96 of the harness's
        standard errors to either side, or none. Raises UserError if a task's data are not available.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        class Deciding(HFLM):
            """Lets a switch decide at the end of each request's context, of which HFLM tells the model nothing."""

            def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
                score = super()._loglikelihood_tokens
                return by_decision(
                    model, requests, lambda request: request[1], lambda part: score(part, *args, **kwargs)
                )

        wrapped = Deciding(
            pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=self.batch_size,
            add_bos_token=tokenizer.bos_token_id is not None,
        )  # fmt: skip
        try:
            results = simple_evaluate(
                wrapped, tasks=self.tasks, task_manager=self.manager, limit=self.limit, bootstrap_iters=1000
            )
        except (OSError, ValueError, KeyError) as error:  # most often, a data set is not there
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"--lm-eval {','.join(self.tasks)}: {reason} (is there network, or a cache?)") from error
        assert results is not None
        return {task: _metrics(task, found, results) for task, found in results["results"].items()}


def _metrics(task: str, found: dict[str, Any], results: Any) -> dict[str, Any]:
    samples = results["samples"].get(task, [])
    metrics = {}
    for key, value in found.items():
        metric, _, filtered = key.partition(",")
        if "_stderr" in metric or not isinstance(value, (int, float)) or not filtered:
            continue
        own = [s[metric] for s in samples if s.get("filter", filtered) == filtered and metric in s]
        numbers = [float(v) for v in own if isinstance(v, (bool, int, float))]
        error = found.get(f"{metric}_stderr,{filtered}")
        if numbers and abs(sum(numbers) / len(numbers) - value) < 1e-9:
            bounds: Any = interval(numbers)
        else:
            bounds = (value - 1.96 * error, value + 1.96 * error) if isinstance(error, float) else None
        rows = len(numbers) or len(samples) or found.get("sample_len", 0)  # a group's rows are those of its tasks
        name = metric if filtered == "none" else f"{metric} ({filtered})"
        metrics[name] = {"value": value, "interval": bounds, "rows": rows}
    return metrics
