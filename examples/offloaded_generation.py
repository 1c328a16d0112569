"""Generate text with a model whose experts are on disk, with a cache of them, under two policies. The text is the same.

python examples/offloaded_generation.py
"""

from __future__ import annotations

from speculation import CacheSize, OffloadedModel

PROMPT = "def add(a, b):"


def main() -> None:
    texts = set()
    for policy in ("lru", "ewma"):
        # "demo" is the embedded model; a hub id or a folder of safetensors works as well.
        with OffloadedModel.load("demo", CacheSize(fraction=0.5), store="disk", policy=policy) as offloaded:
            (generation,) = offloaded.generate([PROMPT], max_new_tokens=24)
            counts = offloaded.experts.decode
            print(f"{policy}: {counts.hits} of {counts.requested} experts were in the cache")
            texts.add(generation.text)
    assert len(texts) == 1, "the output must not depend on the policy"
    print(PROMPT + texts.pop())


if __name__ == "__main__":
    main()
