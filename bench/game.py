"""The Soft-IntroVAE game on a finite alphabet, where its equilibrium can be computed exactly.

The paper's theorem: at the Nash equilibrium the decoder's distribution minimises
KL(p_data || p) + gamma H(p), and the encoder is its posterior. Here encoder and decoder are tables of logits,
every expectation is a sum, and many games are played side by side.

    python bench/game.py [--out bench/results]     plays the games of TABLE, writes game.json and game.png
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
from measure import machine
from torch import Tensor

ALPHA = 2.0
LATENTS = 4  # values of z, uniform prior
RESULTS = Path(__file__).parent / "results"

THIRD = 1 / 3
TABLE = [  # p_data and gamma of the games played for the figure and in the tests
    ((0.5, 0.3, 0.2), 0.0),
    ((0.5, 0.3, 0.2), 0.1),
    ((0.5, 0.3, 0.2), 0.25),
    ((0.5, 0.3, 0.2), 0.5),
    ((0.5, 0.3, 0.2), 1.0),
    ((0.6, 0.3, 0.1), 0.5),
    ((0.4, 0.35, 0.25), 0.5),
    ((0.4, 0.35, 0.25), 1.0),
    ((THIRD, THIRD, THIRD), 0.5),
    ((THIRD, THIRD, THIRD), 1.0),
]


def gain(p: Tensor, p_data: Tensor, gamma: Tensor | float) -> Tensor:
    """What the equilibrium decoder maximises, up to a constant: -KL(p_data || p) - gamma H(p). p [..., X]."""
    return (p_data * p.log()).sum(-1) + gamma * torch.xlogy(p, p).sum(-1)


def optimum(p_data: tuple[float, ...], gamma: float, step: float = 0.01) -> Tensor:
    """The maximiser [3] of `gain` over distributions of three atoms: best grid point, then polished."""
    data = torch.tensor(p_data, dtype=torch.float64)
    axis = torch.arange(step, 1, step, dtype=torch.float64)
    first, second = torch.cartesian_prod(axis, axis).unbind(1)
    grid = torch.stack((first, second, 1 - first - second), 1)
    grid = grid[grid[:, 2] > step / 2]
    logits = grid[gain(grid, data, gamma).argmax()].log().requires_grad_()
    solver = torch.optim.LBFGS(
        [logits], max_iter=200, tolerance_grad=1e-9, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        solver.zero_grad()
        value = -gain(logits.softmax(0), data, gamma)
        value.backward()
        return value

    solver.step(loss)
    return logits.detach().softmax(0)


def elbo(encoder: Tensor, decoder: Tensor) -> Tensor:
    """ELBO [G, X] of every atom; encoder [G, X, Z] and decoder [G, Z, X] are logits of q(z|x) and p(x|z)."""
    log_q = encoder.log_softmax(2)
    log_joint = decoder.log_softmax(2).transpose(1, 2) - math.log(LATENTS)
    return (log_q.exp() * (log_joint - log_q)).sum(2)


def marginal(decoder: Tensor) -> Tensor:
    """p(x) [G, X] under the uniform prior."""
    return decoder.softmax(2).mean(1)


def encoder_gain(encoder: Tensor, decoder: Tensor, p_data: Tensor) -> Tensor:
    """What the encoder maximises [G]: E_data[ELBO] - E_p[exp(alpha ELBO)] / alpha."""
    w = elbo(encoder, decoder)
    return (p_data * w - marginal(decoder) * (ALPHA * w).exp() / ALPHA).sum(1)


def decoder_gain(encoder: Tensor, decoder: Tensor, p_data: Tensor, gamma: Tensor) -> Tensor:
    """What the decoder maximises [G]: E_data[ELBO] + gamma E_p[ELBO], p through the decoder too."""
    w = elbo(encoder, decoder)
    return ((p_data + gamma[:, None] * marginal(decoder)) * w).sum(1)


def posterior_gap(encoder: Tensor, decoder: Tensor, p_data: Tensor) -> Tensor:
    """KL(q(z|x) || p(z|x)) [G] averaged over the data."""
    return (p_data * (marginal(decoder).log() - elbo(encoder, decoder))).sum(1)


class Played(NamedTuple):
    encoder: Tensor  # logits [G, X, Z]
    decoder: Tensor  # logits [G, Z, X]
    path: Tensor  # marginals [T, G, X] along the way


def play(p_data: Tensor, gamma: Tensor, seed: int = 0, rounds: int = 6000, lr: float = 0.02) -> Played:
    """Play G games at once: Adam, 3 encoder steps per decoder step. p_data [G, X] and gamma [G], fp64."""
    games, atoms = p_data.shape
    generator = torch.Generator().manual_seed(seed)
    table = lambda *shape: torch.randn(
        games, *shape, generator=generator, dtype=torch.float64
    ).requires_grad_()
    encoder, decoder = table(atoms, LATENTS), table(LATENTS, atoms)
    adam = [torch.optim.Adam([player], lr=lr, fused=True) for player in (encoder, decoder)]

    def step(optimizer: torch.optim.Optimizer, player: Tensor, objective: Tensor) -> None:
        (gradient,) = torch.autograd.grad(objective.sum(), player)
        player.grad = -gradient
        optimizer.step()

    path = []
    for i in range(rounds):
        if i % max(rounds // 1000, 1) == 0:
            path.append(marginal(decoder).detach())
        for _ in range(3):
            step(adam[0], encoder, encoder_gain(encoder, decoder.detach(), p_data))
        step(adam[1], decoder, decoder_gain(encoder.detach(), decoder, p_data, gamma))
    return Played(encoder.detach(), decoder.detach(), torch.stack([*path, marginal(decoder).detach()]))


def play_table(seed: int = 0, rounds: int = 6000) -> tuple[Played, Tensor]:
    """The games of TABLE and their p_data [10, 3]."""
    p_data = torch.tensor([p for p, _ in TABLE], dtype=torch.float64)
    gamma = torch.tensor([g for _, g in TABLE], dtype=torch.float64)
    return play(p_data, gamma, seed, rounds), p_data


def draw_figure(played: Played, path: Path) -> None:
    """For p_data = (.5, .3, .2). Left: the decoder's way through the simplex. Right: where it ends."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    data = TABLE[0][0]
    rows = [i for i, (p, _) in enumerate(TABLE) if p == data]
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 0.866]], dtype=torch.float64)
    figure, (simplex, curves) = plt.subplots(1, 2, figsize=(11, 4.8))
    simplex.plot(*corners[[0, 1, 2, 0]].T, color="0.6", lw=1)
    colours = plt.get_cmap("viridis")(torch.linspace(0, 0.9, len(rows)).tolist())
    for row, colour in zip(rows, colours, strict=True):
        gamma = TABLE[row][1]
        simplex.plot(*(played.path[:, row] @ corners).T, color=colour, lw=1.2)
        simplex.plot(*(optimum(data, gamma) @ corners), "*", ms=11, color=colour, label=f"gamma = {gamma:g}")
    simplex.plot(*(torch.tensor(data, dtype=torch.float64) @ corners), "k+", ms=10, label="p_data")
    for name, (x, y) in zip(("$x_1$", "$x_2$", "$x_3$"), corners.tolist(), strict=True):
        shift = ((x - 0.5) * 22 - 5, (y - 0.3) * 16 - 4)
        simplex.annotate(name, (x, y), xytext=shift, textcoords="offset points")
    simplex.set_title("way of the decoder's p, * predicted optimum")
    simplex.legend(frameon=False, loc="upper left", fontsize=8)
    simplex.set_axis_off()
    simplex.set_aspect("equal")

    gammas = torch.linspace(0, 1, 41).tolist()
    predicted = torch.stack([optimum(data, g) for g in gammas])
    for atom, colour in enumerate(("C0", "C1", "C2")):
        curves.plot(gammas, predicted[:, atom], color=colour, label=f"predicted $p_{atom + 1}$")
        ends = played.path[-1, rows, atom]
        style = {"marker": "o", "mfc": "none", "ls": "none", "color": colour}
        curves.plot([TABLE[r][1] for r in rows], ends, **style, label=f"played $p_{atom + 1}$")
    bound = data[0] ** (1 / (ALPHA + 1))
    curves.axhline(bound, color="0.6", ls=":", lw=1)
    note = "$p_1^3 = p_{data}$: the encoder lets no atom further"
    curves.annotate(note, (0, bound - 0.04), fontsize=8, color="0.4")
    curves.set(xlabel="gamma", ylim=(0, 1.05), title="p_data = (.5, .3, .2)")
    curves.legend(frameon=False, fontsize=8, ncol=3, loc="upper left")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder; default: the committed results")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    played, p_data = play_table()
    gaps = posterior_gap(played.encoder, played.decoder, p_data)
    rows = []
    for i, (data, gamma) in enumerate(TABLE):
        p, target = played.path[-1, i], optimum(data, gamma)
        row = {
            "p_data": [round(v, 4) for v in data],
            "gamma": gamma,
            "predicted": [round(v, 4) for v in target.tolist()],
            "played": [round(v, 4) for v in p.tolist()],
            "posterior_gap": gaps[i].item(),
        }
        rows.append(row)
        print(row)
    record = {"command": "python bench/game.py", **machine("cpu"), "games": rows}
    (out / "game.json").write_text(json.dumps(record, indent=1) + "\n")
    draw_figure(played, out / "game.png")


if __name__ == "__main__":
    main()
