"""vLLM by itself on a saved model: `plain_vllm.py FOLDER` prints the six likeliest tokens after PROMPT, one by one."""

from __future__ import annotations

import json
import os
import sys

PROMPT, LENGTH = [5, 6, 7], 6


def main(folder: str) -> None:
    """As a user would who knows nothing of align."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    small = {"max_model_len": 32, "max_num_seqs": 2, "kv_cache_memory_bytes": 2**24, "enforce_eager": True}
    llm = LLM(folder, dtype="float32", **small)
    greedy = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True)
    (answer,) = llm.generate([{"prompt_token_ids": PROMPT}], greedy, use_tqdm=False)
    print(json.dumps(list(answer.outputs[0].token_ids)))


if __name__ == "__main__":
    main(sys.argv[1])
