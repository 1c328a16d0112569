"""The model card of a run."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from profiler.errors import counted
from profiler.trace.hub import escaped_line
from profiler.trace.reader import Trace
from speculation.data.tasks import Task
from speculation.predictors.base import Predictor
from speculation.predictors.options import Epochs, TrainingOptions


def model_card(predictor: Predictor, options: TrainingOptions, history: Epochs, facts: dict[str, Any], trace: Trace) -> str:
    """The model card as Markdown: task, model, training data, and how to use the predictor."""
    shape, model = predictor.shape, trace.metadata.model
    has_validation, has_texts = facts["validation_problems"] > 0, predictor.keeps_training_texts()
    arguments = "expert_ids, weights, router_input" if predictor.takes_router_inputs else "expert_ids, weights"
    when = {Task.NEXT_LAYER: "after each layer but the last", Task.NEXT_TOKEN: "after all layers"}.get(
        shape.task, "after begin"
    )
    data = ", ".join(dataset.name for dataset in trace.metadata.datasets) or "unknown data"
    last = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in (history[-1] if history else {}).items())
    lines = [
        "---",
        "tags:",
        "- mixture-of-experts",
        "- expert-prediction",
        "library_name: speculative-moe",
        "---",
        "",
        f"# {predictor.name} for {escaped_line(model.id)}",
        "",
        f"Predicts which experts a mixture-of-experts model will select: {predictor.about}.",
        "",
        f"- **task**: {shape.task}, h = 1 to {shape.horizon}; sees {predictor.sees}",
        f"- **model**: {escaped_line(model.id)}, {counted(shape.layers, 'MoE layer')}, {shape.experts} experts, "
        f"top-{shape.top_k}",
        f"- **size**: {facts['parameters']:,} parameters, {facts['bytes']:,} bytes",
        *(["- **contains**: texts of training problems, as token ids with their routes"] if has_texts else []),
        f"- **trained on**: {counted(facts['train_problems'], 'problem')}, {facts['train_tokens']:,} tokens of "
        f"{escaped_line(trace.path.name)} ({escaped_line(data)}), in {facts['train_seconds']:.0f} s",
        *(
            [f"- **early stopping on**: {counted(facts['validation_problems'], 'other problem')}"]
            if history and has_validation
            else []
        ),
        *([f"- **last epoch**: {last}"] if last else []),
        f"- **source**: {escaped_line(predictor.source)}",
        "",
        *(
            ("To evaluate it on held-out problems, next to chance, popularity and a shuffled control:",)
            if shape.task.predicts_experts
            else ("To see what a cache gains by it on held-out problems, next to lru, belady and a shuffled control:",)
        ),
        "",
        "    specmoe evaluate RUN --trace TRACE" if shape.task.predicts_experts else "    specmoe simulate TRACE --policy RUN",
        "",
        "```python",
        "from speculation import History, load_predictor",
        "",
        'predictor = load_predictor("RUN")',
        "history = History(predictor.shape)",
        "history.begin(vocab_id)              # start a token",
        f"history.add({arguments})     # its experts at the first MoE layer, then at the second, ...",
        f"predictor.predict(history)           # {when}: ranked expert ids and their scores",
        "```",
        "",
        "| option | value |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in asdict(options).items() if value is not None),
        "",
    ]
    return "\n".join(lines)
