"""Quantises a model with llm-compressor's `model_free_ptq`, for `jobs/benchmark.py --peer` of a conversion.

    python jobs/model_free_run.py MODEL OUTPUT SCHEME WORKERS

Runs in an interpreter that has llm-compressor 0.14, which is not a dependency of gs_dist.
"""

from __future__ import annotations

import sys


def main() -> None:
    from llmcompressor import model_free_ptq

    model, output, scheme, workers = sys.argv[1:5]
    model_free_ptq(
        model_stub=model,
        save_directory=output,
        scheme=scheme,
        ignore=["lm_head", r"re:.*embed_tokens"],
        max_workers=int(workers),
        device="cpu",
    )


if __name__ == "__main__":
    main()
