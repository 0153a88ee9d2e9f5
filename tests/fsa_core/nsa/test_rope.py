import torch

from fsa_core.nsa.rope import rotate


def test_scores_depend_on_distance_alone(device):
    q, k = (torch.randn(1, 1, 32, device=device) for _ in range(2))

    def score(q_position, k_position):
        rotated = (
            rotate(x, torch.tensor([p], device=device), 10000.0)
            for x, p in ((q, q_position), (k, k_position))
        )
        return torch.linalg.vecdot(*rotated).item()

    near = score(7, 3)
    # Millions of tokens away the angles are still those of the distance.
    for shift in (1, 1000, 3_000_000):
        torch.testing.assert_close(score(7 + shift, 3 + shift), near, rtol=0, atol=1e-5)
    assert abs(score(8, 3) - near) > 1e-3


def test_pairs_are_turned_by_their_frequencies(device):
    """Against the complex numbers of the paper: pair i at position p is turned by p * theta^(-2i / dim)."""
    x = torch.randn(5, 2, 8, dtype=torch.float64).float().to(device)
    position = torch.tensor([0, 1, 2, 50, 100], device=device)
    turn = torch.polar(
        torch.ones(5, 4, dtype=torch.float64),
        position[:, None].cpu() * 100.0 ** (-torch.arange(4, dtype=torch.float64) / 4),
    ).to(device)
    expected = torch.complex(x[..., :4].double(), x[..., 4:].double()) * turn[:, None]
    torch.testing.assert_close(
        rotate(x, position, 100.0).double(), torch.cat([expected.real, expected.imag], -1), rtol=0, atol=1e-6
    )
    assert torch.equal(rotate(x, position, 100.0)[0], x[0])
