"""Summaries of jobs that nobody ran, for what shows them."""

from __future__ import annotations

from gs_dist.results.quantized import LinearSummary
from gs_dist.results.summary import CalibrationSummary, PerplexitySummary, ProbeSummary, StageSummary

ROLES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
STATIC = "SmoothQuant-wclip-W8-perchannel-A8-pertensor"


def linear_row(layer: int, role: str, error: float, **fields: object) -> LinearSummary:
    """A row of a linear that lost this share of its output's energy."""
    given = {
        "strategy": STATIC,
        "error_source": "sketch",
        "activation_error": error / 2,
        "token_error": error / 3,
        "scale_min": 1e-3,
        "scale_max": 2e-2,
        "num_tokens": 65536,
        "input_min": -9.5 - layer,
        "input_max": 7.0,
        "input_typical": 0.5,
        "outlier_channels": (7, 1031),
        **fields,
    }
    return LinearSummary(layer=layer, name=f"model.layers.{layer}.{role}", relative_error=error, **given)  # type: ignore[arg-type]  # values of any field


def dense_rows(num_layers: int) -> tuple[LinearSummary, ...]:
    """Seven linears a layer and a head that stays; errors grow with depth."""
    rows = [
        linear_row(layer, role, 1e-5 * (layer + 1) * (n + 1) ** 2)
        for layer in range(num_layers)
        for n, role in enumerate(ROLES)
    ]
    head = LinearSummary(
        layer=num_layers,
        name="lm_head",
        strategy="NA",
        relative_error=None,
        error_source="none",
        scale_min=None,
        scale_max=None,
        num_tokens=0,
    )
    return (*rows, head)


def expert_rows(num_layers: int, num_experts: int) -> tuple[LinearSummary, ...]:
    """Experts of which the first of each layer was reached by too few tokens."""
    return tuple(
        linear_row(
            layer,
            f"mlp.experts.{expert}.{role}",
            1e-4 * (expert + 1),
            num_tokens=512,
            num_given=100 if expert == 0 else 512,
        )
        for layer in range(num_layers)
        for expert in range(num_experts)
        for role in ("gate_proj", "up_proj", "down_proj")
    )


def worker(stage: int, replica: int, layers: int, **fields: object) -> StageSummary:
    """A worker that was busy three quarters of its time."""
    given = {
        "seconds": 90.0,
        "idle_share": 0.25,
        "peak_memory_planned": 4 << 30,
        "peak_memory_measured": 3 << 30,
        "account": {"load": 5.0, "pass": 50.0, "partial sums": 5.0, "solve": 25.0, "write": 5.0},
        **fields,
    }
    end = (stage + 1) * layers
    return StageSummary(stage=stage, replica=replica, first_layer=stage * layers, end_layer=end, **given)  # type: ignore[arg-type]  # values of any field


def a_summary(rows: tuple[LinearSummary, ...], **fields: object) -> CalibrationSummary:
    """A job on two stages and two replicas, probed and evaluated."""
    given = {
        "model": "Llama-3-70B",
        "formats": ("compressed-tensors",),
        "propagation": "original",
        "num_samples": 512,
        "num_tokens": 1048576,
        "seconds": 5230.0,
        "versions": {"gs-dist": "0.1.0", "mindspore": "2.10.0"},
        "fingerprints": {"recipe": "ab" * 32, "source": "cd" * 32, "data": "ef" * 32},
        "stages": tuple(worker(stage, replica, 40) for stage in range(2) for replica in range(2)),
        "source_bytes": 141 << 30,
        "model_bytes": {"compressed-tensors": 72 << 30},
        "probes": (
            ProbeSummary(
                format="compressed-tensors",
                perplexity=3.21,
                float_perplexity=3.17,
                num_samples=8,
                num_tokens=4088,
                calibration_data=True,
                num_new_tokens=16,
                num_equal_tokens=16,
            ),
        ),
        "evaluations": (
            PerplexitySummary(
                format="compressed-tensors",
                perplexity=3.31,
                float_perplexity=3.24,
                num_samples=64,
                sequence_length=512,
                num_tokens=32704,
                data=("evaluation.parquet",),
                data_fingerprint="ab" * 32,
            ),
        ),
        **fields,
    }
    return CalibrationSummary(rows=rows, **given)  # type: ignore[arg-type]  # values of any field
