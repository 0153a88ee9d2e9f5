"""Block choices to measure on: those that fsa_core draws, and recorded ones."""

from pathlib import Path
from typing import Literal

import numpy as np
import torch

from fsa_core.drawn_indices import DrawnKind

Kind = DrawnKind | Literal["recorded"]


def recorded_block_indices(path: Path) -> torch.Tensor:
    """int32 [heads, tokens, slots] of an .npz whose arrays are [heads, tokens, slots], one a layer.

    Neighbouring heads are of different layers, so that the first few are a sample of them all.
    """
    with np.load(path) as layers:
        stacked = np.stack([layers[name] for name in layers.files], axis=1)
    return torch.from_numpy(stacked.reshape(-1, *stacked.shape[2:]).astype(np.int32))
