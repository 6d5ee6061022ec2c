"""Serves model directories with vLLM in this process, one after another, and prints a line of JSON of each.

    PYTHON_OF_ENGINES tests/engines/serve.py ROWS.json NUM_NEW DIRECTORY...

ROWS.json is a list of lists of token ids. A line holds the directory, and either the class that runs each kind of
linear, the log probability of every token given those before it, and a greedy continuation of the first row's
beginning; or the words with which vLLM refused the directory.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
os.environ["HF_HUB_OFFLINE"] = os.environ["VLLM_NO_USAGE_STATS"] = "1"

PROMPT = 8


def kernels(model: Any) -> dict[str, str]:
    """Last name of each linear to the class of its scheme or method, and of the kernel within."""
    found = {}
    for name, module in model.named_modules():
        method = getattr(module, "scheme", None) or getattr(module, "quant_method", None)
        if method is None:
            continue
        kernel = getattr(method, "kernel", None)
        way = getattr(kernel, "linear_method", None)  # a kernel's way to compute, chosen by the CPU's instructions
        parts = [type(method).__name__] + ([type(kernel).__name__] if kernel is not None else [])
        parts += [way.__name__] if way is not None else []
        found[name.rpartition(".")[2]] = "/".join(parts)
    return found


def serve(directory: str, rows: list[list[int]], num_new: int) -> dict[str, Any]:
    """What the module's page says."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        directory,
        dtype="bfloat16",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=4,
        seed=0,
    )
    found: dict[str, Any] = {}
    llm.apply_model(lambda model: found.update(kernels=kernels(model)))
    outputs = llm.generate(
        [{"prompt_token_ids": row} for row in rows],
        SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False),
        use_tqdm=False,
    )
    found["log_probabilities"] = [
        [entry[token].logprob for entry, token in zip(out.prompt_logprobs[1:], out.prompt_token_ids[1:], strict=True)]
        for out in outputs
    ]
    (greedy,) = llm.generate(
        [{"prompt_token_ids": rows[0][:PROMPT]}],
        SamplingParams(max_tokens=num_new, temperature=0.0, ignore_eos=True, detokenize=False),
        use_tqdm=False,
    )
    found["greedy"] = list(greedy.outputs[0].token_ids)
    return found


def main(rows: str, num_new: str, *directories: str) -> None:
    with open(rows, encoding="utf-8") as file:
        content = json.load(file)
    for directory in directories:
        try:
            found = serve(directory, content, int(num_new))
        except Exception as error:
            found = {"refused": f"{type(error).__name__}: {error}"}
        print("\n" + json.dumps({"directory": directory, **found}), flush=True)
        gc.collect()
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()
    os._exit(0)  # the engine's threads have nothing to say any more


if __name__ == "__main__":
    main(*sys.argv[1:])
