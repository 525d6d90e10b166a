"""How far a rate is from the ramp that DSR differentiates: IF and LIF under a constant input, and
an input that changes.

Command:  python -m benchmarks.dsr_error [--out dsr_error.svg]
Result:   IF, alpha 0.5: largest error 0.0999, 0.0250, 0.0050, 0.0005 of a height at T = 5, 20, 100,
          1000, on its bound. LIF, alpha 0.3: from T = 100 on 0.1268, 0.0666, 0.0343, 0.0188 at dt =
          0.2, 0.1, 0.05, 0.025, on its bound; at T = 1000 0.1269, 0.0666, 0.0341, 0.0173. Input
          with noise of one height: T times the mean error 0.46, 1.10, 1.76, 2.81 at T = 5, 20, 100,
          1000, where a constant input has 0.25; commit 777df71, float64, 3 s on one core of an AMD
          EPYC

Errors are in parts of a spike's height, over inputs spread evenly on the ramp. IF's falls as 1/T
below its bound max(alpha, 1 - alpha)/T. LIF's levels off at a floor that dt decides, below its
bound max(alpha, 1 - alpha)(1 - b)/(1 - b^T). Noise around the same means obeys no bound: T times
the error, bounded above for a constant input, grows.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from pipeline.core.printing import new_console, number, print_table, say
from pipeline.spiking.rate import RateIF, RateLIF, RateNeuron, rate_weights
from pipeline.spiking.state import fresh_state

TIMES = (5, 10, 20, 50, 100, 200, 400, 1000)
STEPS_OF_LIF = (0.2, 0.1, 0.05, 0.025)
INPUTS = 1014  # spread in steps of 1/1013, a prime: on multiples of 1/T a rate has no error


@dataclass(frozen=True)
class Curve:
    """Errors over TIMES; `largest` or mean over inputs, and where there is one the bound on the
    largest.
    """

    panel: str
    name: str
    errors: Sequence[float]
    bounds: Sequence[float] | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path("dsr_error.svg"), help="where the drawing goes"
    )
    out: Path = parser.parse_args().out
    curves = [*constant_if(), *constant_lif(), *changing()]
    console = new_console()
    for panel in dict.fromkeys(curve.panel for curve in curves):
        print_panel(panel, [curve for curve in curves if curve.panel == panel], console)
    out.write_text(drawing(curves))
    say(console, f"drawn in {out}")


def constant_if() -> list[Curve]:
    return [
        Curve(
            "IF, constant input: largest error",
            f"alpha {alpha:g}",
            [errors(RateIF(alpha=alpha), steps).max().item() for steps in TIMES],
            [max(alpha, 1 - alpha) / steps for steps in TIMES],
        )
        for alpha in (0.3, 0.5, 1.0)
    ]


def constant_lif() -> list[Curve]:
    curves = []
    for dt in STEPS_OF_LIF:
        neuron = RateLIF(dt=dt)
        part, b = max(neuron.alpha, 1 - neuron.alpha), neuron.decay
        bounds = [part * (1 - b) / (1 - b**steps) for steps in TIMES]
        found = [errors(neuron, steps).max().item() for steps in TIMES]
        curves.append(Curve("LIF, constant input: largest error", f"dt {dt:g}", found, bounds))
    return curves


def changing() -> list[Curve]:
    """Gaussian noise of one height's deviation around each mean; the ramp is that of the mean input
    that there was.
    """
    panel = "IF, input that changes: T x mean error"
    found = {
        noise: [steps * errors(RateIF(), steps, noise=noise).mean().item() for steps in TIMES]
        for noise in (0.0, 0.5, 1.0)
    }
    return [Curve(panel, f"noise {noise:g}", values) for noise, values in found.items()]


def errors(neuron: RateNeuron, steps: int, *, noise: float = 0.0) -> Tensor:
    """|weighted rate - clamp(gain I)| / height of inputs spread over the ramp, in float64."""
    neuron = neuron.double()
    height = neuron.threshold.item() / neuron.dt
    generator = torch.Generator().manual_seed(steps)
    share_TB = torch.linspace(0, 1, INPUTS, dtype=torch.float64).expand(steps, 1, -1)
    share_TB = share_TB + noise * torch.randn(
        share_TB.shape, generator=generator, dtype=torch.float64
    )
    with torch.no_grad(), fresh_state(neuron):
        out_TB = neuron(share_TB * height / neuron.gain)
    weights_T = rate_weights(neuron.decay, out_TB)
    rate_B, ramp_B = (
        torch.tensordot(weights_T, x_TB, dims=1) for x_TB in (out_TB, share_TB * height)
    )
    return (rate_B - ramp_B.clamp(0, height)).abs() / height


# -------------------------------------------------------------------------------- table and drawing


def print_panel(panel: str, curves: Sequence[Curve], console: Console) -> None:
    rows = []
    for index, steps in enumerate(TIMES):
        cells = [
            f"{c.errors[index]:.4f}" + (f" ({c.bounds[index]:.4f})" if c.bounds else "")
            for c in curves
        ]
        rows.append((str(steps), *cells))
    title = (
        f"{panel}, in heights (bound in brackets)" if curves[0].bounds else f"{panel}, in heights"
    )
    print_table(
        console, [*map(number, ("T", *(curve.name for curve in curves)))], rows, title=title
    )


WIDTH, HEIGHT, MARGIN = 360, 300, 50
COLOURS = ("#4053d3", "#ddb310", "#b51d14", "#00b25d")


def drawing(curves: Sequence[Curve]) -> str:
    """The panels side by side, both axes logarithmic, bounds dashed: an SVG."""
    panels = list(dict.fromkeys(curve.panel for curve in curves))
    parts = [
        _panel(panel, [c for c in curves if c.panel == panel], index * WIDTH)
        for index, panel in enumerate(panels)
    ]
    size = f'width="{WIDTH * len(panels)}" height="{HEIGHT}"'
    style = 'font-family="sans-serif" font-size="11"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}><rect {size}'
        f' fill="white"/>{"".join(parts)}</svg>\n'
    )


def _panel(title: str, curves: Sequence[Curve], left: float) -> str:
    values = [
        value for curve in curves for line in (curve.errors, curve.bounds or ()) for value in line
    ]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))

    def x(steps: float) -> float:
        share = math.log(steps / TIMES[0]) / math.log(TIMES[-1] / TIMES[0])
        return left + MARGIN + share * (WIDTH - 1.5 * MARGIN)

    def y(value: float) -> float:
        return HEIGHT - MARGIN - (math.log10(value) - low) / (high - low) * (HEIGHT - 2 * MARGIN)

    def line(values: Sequence[float], colour: str, dash: str) -> str:
        points = " ".join(
            f"{x(steps):.1f},{y(value):.1f}" for steps, value in zip(TIMES, values, strict=True)
        )
        return (
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"'
            f' stroke-dasharray="{dash}"/>'
        )

    parts = [
        f'<text x="{left + MARGIN}" y="20">{title}</text>',
        f'<text x="{left + WIDTH / 2}" y="{HEIGHT - 12}">T</text>',
    ]
    parts += [
        f'<text x="{x(t):.1f}" y="{HEIGHT - MARGIN + 15}" text-anchor="middle">{t}</text>'
        for t in TIMES[::2]
    ]
    for power in range(low, high + 1):
        parts.append(
            f'<line x1="{x(TIMES[0])}" x2="{x(TIMES[-1])}" y1="{y(10**power)}" y2="{y(10**power)}"'
            ' stroke="#ddd"/>'
        )
        parts.append(
            f'<text x="{left + MARGIN - 5}" y="{y(10**power) + 4:.1f}"'
            f' text-anchor="end">{10.0**power:g}</text>'
        )
    for index, (curve, colour) in enumerate(zip(curves, COLOURS, strict=False)):
        parts.append(line(curve.errors, colour, "none"))
        if curve.bounds:
            parts.append(line(curve.bounds, colour, "4 3"))
        parts.append(
            f'<text x="{left + MARGIN + 8}" y="{HEIGHT - MARGIN - 8 - 14 * index}"'
            f' fill="{colour}">{curve.name}</text>'
        )
    return "".join(parts)


if __name__ == "__main__":
    main()
