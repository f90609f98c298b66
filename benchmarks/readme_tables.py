"""Puts the README's tables between their markers and draws its plots, from the committed results.

python benchmarks/readme_tables.py
"""

import re
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def cpu_encoder() -> str:
    tables = []
    for path in sorted(RESULTS.glob("cpu_encoder_*.csv")):
        rows = pd.read_csv(path)
        first = rows.iloc[0]
        time = rows[rows.metric == "time"].pivot(index=["workload", "mode"], columns="provider", values="p50")
        ratio = rows[rows.metric.str.startswith("speedup")].set_index(["workload", "mode"])["p50"]
        lines = [
            f"{first.card}, base shape, float32, ms (median); torch {first.torch}, transformers {first.transformers}, "
            f"{first.date}",
            "",
            "| workload | mode | padded transformers | packed | ratio |",
            "|---|---|---|---|---|",
        ]
        for (workload, mode), row in time.drop(index="positions256", level=0).iterrows():
            theirs, ours = row["transformers_sdpa_padded"], row["siglip2_packed"]
            lines.append(f"| {workload} | {mode} | {theirs:.0f} | {ours:.0f} | {ratio[workload, mode]:.2f}x |")
        positions = time.loc[("positions256", "forward")]
        lines += [
            "",
            f"Positions of 256 distinct grids: {positions['siglip2_packed']:.1f} ms, a loop of `F.interpolate` "
            f"{positions['interpolate_loop']:.0f} ms ({ratio['positions256', 'forward']:.0f}x).",
        ]
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


PROVIDERS = {
    "triton": "own Triton",
    "torch_varlen": "torch varlen",
    "flash_attention_2": "FA2",
    "flash_attention_4": "FA4",
    "cudnn_dense": "cuDNN, dense",
}


def attention_times(head_dim: int, path: Path) -> pd.DataFrame:
    """Medians in µs; index (workload, mode), a column a provider."""
    rows = pd.read_csv(path)
    rows = rows[(rows.metric == "time") & rows.workload.str.endswith(f"_k{head_dim}")]
    table = rows.pivot(index=["workload", "mode"], columns="provider", values="p50") * 1e3
    order = rows.workload.unique()
    return table.loc[[(workload, mode) for workload in order for mode in ("forward", "backward")]]


def attention() -> str:
    tables = []
    for path in sorted(RESULTS.glob("attention_*.csv")):
        first = pd.read_csv(path).iloc[0]
        tables.append(
            f"{first.card}, bfloat16, 16 heads, T = 16384 (or a workload's images), µs forward / backward (medians); "
            f"torch {first.torch}, triton {first.triton}, {first.date}"
        )
        for head_dim in (72, 64):
            times = attention_times(head_dim, path)
            lines = [f"| head_dim {head_dim} | {' | '.join(PROVIDERS.values())} |", "|---" * (len(PROVIDERS) + 1) + "|"]
            for workload in times.index.unique(level=0):
                cells = []
                for provider in PROVIDERS:
                    pair = times.loc[workload][provider].reindex(["forward", "backward"])
                    cells.append("" if pair.isna().any() else " / ".join(f"{x:.0f}" for x in pair))
                name = workload.removesuffix(f"_k{head_dim}").removeprefix("len")
                lines.append(f"| {name} | {' | '.join(cells)} |")
            tables.append("\n".join(lines))
    return "\n\n".join(tables)


def plot_attention() -> None:
    import matplotlib.pyplot as plt

    for path in sorted(RESULTS.glob("attention_*.csv")):
        figure, axes = plt.subplots(2, 2, figsize=(10, 7), sharex=True, layout="constrained")
        for row, head_dim in zip(axes, (64, 72)):
            times = attention_times(head_dim, path)
            lengths = [name for name in times.index.unique(level=0) if name.startswith("len")]
            x = [int(name.split("_")[0].removeprefix("len")) for name in lengths]
            for axis, mode in zip(row, ("forward", "backward")):
                for provider, label in PROVIDERS.items():
                    y = [times.loc[(name, mode), provider] for name in lengths]
                    axis.plot(x, y, marker="o", label=label, lw=2.5 if provider == "triton" else 1.2)
                axis.set(title=f"head_dim {head_dim}, {mode}", xscale="log", yscale="log", ylabel="µs")
                axis.set_xticks(x, [str(length) for length in x])
                axis.grid(alpha=0.3)
        for axis in axes[1]:
            axis.set_xlabel("segment length")
        axes[0][0].legend()
        figure.suptitle(f"Varlen attention, 16384 rows, 16 heads, bf16: {path.stem.split('_')[-1].upper()}")
        figure.savefig(path.with_suffix(".png"), dpi=110)


TABLES = {"attention": attention, "cpu_encoder": cpu_encoder}


def render(readme: str) -> str:
    for name, table in TABLES.items():
        block = f"<!-- table: {name} -->\n{table()}\n<!-- end -->"
        readme = re.sub(rf"<!-- table: {name} -->\n.*?<!-- end -->", lambda _: block, readme, flags=re.DOTALL)
    return readme


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(render(path.read_text()))
    plot_attention()
