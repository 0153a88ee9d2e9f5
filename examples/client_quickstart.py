"""A first call, with the base install only: ``python examples/client_quickstart.py [HOST:PORT]``."""

import sys

import numpy as np

from service.client import AttentionClient, BlockIndices, InvalidRequest

TOKENS, Q_HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 512, 8, 2, 64, 64


def main(target: str) -> None:
    rng = np.random.default_rng(0)
    q = rng.standard_normal((TOKENS, Q_HEADS, HEAD_DIM)).astype(np.float16)
    k = rng.standard_normal((TOKENS, KV_HEADS, HEAD_DIM)).astype(np.float16)
    v = rng.standard_normal((TOKENS, KV_HEADS, HEAD_DIM)).astype(np.float16)

    # Each token attends to the first block of keys and to its own; -1 marks an unused slot.
    own_block = np.arange(TOKENS, dtype=np.int32) // BLOCK_SIZE
    first_block = np.where(own_block > 0, np.int32(0), np.int32(-1))
    block_indices = np.stack([first_block, own_block], axis=-1)[None]  # [1 head for all, tokens, slots]

    with AttentionClient(target) as client:
        client.wait_ready(timeout_seconds=60)
        print("server", client.server_info().version, "on", client.server_info().devices[0].name)

        answer = client.attend(q, k, v, BlockIndices(block_indices, BLOCK_SIZE), return_lse=True)
        print("out", answer.out.shape, answer.out.dtype, "lse", answer.lse.shape)
        print(f"computed in {answer.timings.kernel_seconds * 1e3:.2f} ms")
        # The first token sees one key only, its own.
        np.testing.assert_allclose(answer.out[0, 0], v[0, 0], rtol=1e-2)

        try:
            client.attend(q, k, v, BlockIndices(block_indices + 100, BLOCK_SIZE))
        except InvalidRequest as error:
            print("refused:", error.reason, error.metadata)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051")
