"""README.md of a model directory: what it is, how it was made, how good it is, how to serve it.

Nothing in it tells on which machine it was made: paths are reduced to their last part.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gs_dist.architecture import DecoderArchitecture
from gs_dist.checkpoint.writer import write_bytes
from gs_dist.config import CalibrationConfig, published_recipe
from gs_dist.summary import CalibrationSummary

__all__ = ["render_model_card", "write_model_card"]

_WORST = 5  # linears listed with their error
_FORMATS: Mapping[str, str] = {
    "compressed-tensors": "compressed-tensors, for transformers, vLLM and vLLM-Ascend",
    "ascend": "ModelSlim's layout, for vLLM-Ascend",
    "golden-stick": "Golden Stick's layout, for vLLM-MindSpore",
}


def write_model_card(
    directory: Path, config: CalibrationConfig, summary: CalibrationSummary, architecture: DecoderArchitecture
) -> None:
    """Publishes `directory/README.md`; the directory's name is the format's.

    Raises:
        OutputError: the directory cannot be written.
    """
    text = render_model_card(config, summary, architecture, directory.name)
    write_bytes(directory / "README.md", text.encode())


def render_model_card(
    config: CalibrationConfig, summary: CalibrationSummary, architecture: DecoderArchitecture, format_name: str
) -> str:
    """The card as Markdown with the front matter that model hubs read.

    Args:
        config: the recipe.
        summary: of the job; with perplexities where they were measured.
        architecture: of the model.
        format_name: the dialect of this directory.
    """
    sections = [
        _front_matter(summary, format_name),
        f"# {summary.model}, quantised\n\n{_introduction(summary, architecture, format_name)}",
        f"## Linears\n\n{_strategies(summary)}",
        f"## Quality\n\n{_quality(summary, format_name)}",
        f"## How it was made\n\n{_recipe(config, summary)}",
        f"## How to serve it\n\n{_serving(config, summary, architecture, format_name)}",
        f"## Origin\n\n{_origin(summary)}",
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(summary: CalibrationSummary, format_name: str) -> str:
    bits = sorted({name.split("W", 1)[1][0] for name in summary.strategies if "W" in name})
    tags = [f"int{b}" for b in bits if b.isdigit()] + [format_name, "gs-dist"]
    # JSON strings are YAML strings, whatever a model's name holds.
    return "\n".join(["---", f"base_model: {json.dumps(summary.model)}", f"tags: {json.dumps(tags)}", "---"])


def _introduction(summary: CalibrationSummary, architecture: DecoderArchitecture, format_name: str) -> str:
    kind = f"{architecture.model_type}, {architecture.num_layers} layers, hidden size {architecture.hidden_size}"
    head = "tied to the embedding" if architecture.tie_word_embeddings else "with a head of its own"
    return (
        f"Weights of `{summary.model}` ({kind}, {architecture.dtype}, {head}) after post-training quantisation by "
        f"gs_dist, in the form {_FORMATS.get(format_name, format_name)}. Embedding, norms and head are as they were, "
        "except for norms that took up a rescaling of channels."
    )


def _table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    cells = [list(map(_cell, header)), *(list(map(_cell, row)) for row in rows)]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * len(cells[0]), *lines[1:]])


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _strategies(summary: CalibrationSummary) -> str:
    rows = []
    for strategy, count in summary.strategies.items():
        errors = [
            row.relative_error for row in summary.rows if row.strategy == strategy and row.relative_error is not None
        ]
        rows.append((f"`{strategy}`", count, f"{max(errors):.2e}" if errors else "-"))
    return _table(("strategy", "linears", "largest relative error"), rows) + (
        "\n\n`NA` is a linear that stayed in float. The relative error is that of the linear's output on the "
        "calibration data."
    )


def _quality(summary: CalibrationSummary, format_name: str) -> str:
    worst = [row for row in summary.sorted_rows("error") if row.relative_error is not None][:_WORST]
    parts = []
    if summary.perplexity is not None:
        rows = [("quantised", f"{summary.perplexity:.4f}")]
        if summary.float_perplexity is not None:
            change = summary.perplexity / summary.float_perplexity - 1
            rows = [("float", f"{summary.float_perplexity:.4f}"), (f"quantised ({change:+.2%})", rows[0][1])]
        parts.append(_table(("model", "perplexity"), rows))
    else:
        parts.append("Perplexity was not measured: `gs-dist evaluate` does so.")
    probed = [probe.sentence() for probe in summary.probes if probe.format == format_name]
    parts += [f"Before it was published: {sentence}." for sentence in probed]
    if worst:
        lines = [(f"`{row.name}`", f"`{row.strategy}`", f"{row.relative_error:.2e}") for row in worst]
        table = _table(("linear", "strategy", "relative error"), lines)
        parts.append(f"The linears with the largest relative output error:\n\n{table}")
    parts += [f"* {note}" for note in summary.notes]
    return "\n\n".join(parts)


def _recipe(config: CalibrationConfig, summary: CalibrationSummary) -> str:
    rows: list[tuple[str, object]] = [
        ("calibration", f"{summary.num_samples} samples, {summary.num_tokens} tokens"),
        ("sequence length", config.calibration.sequence_length),
        ("passed from layer to layer", f"the {summary.propagation} output"),
    ]
    rows += [(f"`ptq.{name}`", f"`{_plain(value)}`") for name, value in config.ptq.written_fields().items()]
    for pattern, override in config.layer_policies.items():
        rows.append((f"`layer_policies` `{pattern}`", f"`{_plain(override)}`"))
    recipe = published_recipe(config).rstrip("\n")
    # Tildes, so that backticks in a pattern do not end the block.
    return _table(("setting", "value"), rows) + f"\n\nThe recipe in full:\n\n~~~~yaml\n{recipe}\n~~~~"


def _plain(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=lambda other: getattr(other, "value", str(other)))


def _serving(
    config: CalibrationConfig, summary: CalibrationSummary, architecture: DecoderArchitecture, format_name: str
) -> str:
    strategies = [name for name in summary.strategies if name != "NA"]
    dtype = " --dtype bfloat16" if architecture.dtype == "float32" else ""
    if format_name == "ascend":
        text = _command("vLLM-Ascend", f"vllm serve DIRECTORY --quantization ascend{dtype}")
        if dtype:
            text += "\n\nThe model's dtype is float32; the engine computes in bfloat16, for which the scales were made."
        return text
    if format_name == "golden-stick":
        text = _command("vLLM-MindSpore", "vllm-mindspore serve DIRECTORY --quantization golden-stick")
        if any("A8-pertensor" not in name for name in strategies):
            text += (
                "\n\nvLLM-MindSpore's own reader knows float linears and W8A8 with static activations; the other "
                "strategies above are for networks that Golden Stick builds."
            )
        return text
    parts = [
        "With transformers (`pip install transformers compressed-tensors`):\n\n```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("DIRECTORY")\n'
        'tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")\n```',
        _command("vLLM", f"vllm serve DIRECTORY{dtype}"),
    ]
    symmetric = config.ptq.act_symmetric and not any(
        override and override.get("act_symmetric") is False for override in config.layer_policies.values()
    )
    if strategies and all("A8" in name and "W8" in name for name in strategies) and symmetric:
        parts.append(_command("vLLM-Ascend", f"vllm serve DIRECTORY{dtype}"))
    else:
        parts.append(
            "vLLM-Ascend loads compressed-tensors with int8 weights and symmetric int8 activations only, "
            "so not this one."
        )
    return "\n\n".join(parts)


def _command(engine: str, command: str) -> str:
    return f"With {engine}:\n\n```shell\n{command}\n```"


def _origin(summary: CalibrationSummary) -> str:
    rows = [(f"{name} (sha256)", f"`{digest}`") for name, digest in summary.fingerprints.items()]
    rows += [(name, version) for name, version in summary.versions.items()]
    return _table(("made from or with", "value"), rows) + (
        "\n\n`gs-dist check DIRECTORY` compares names, shapes, dtypes and values with what the format calls for."
    )
