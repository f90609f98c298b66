"""Puts tables between their markers in the README and docs/, and draws the plots, from the committed results.

python benchmarks/readme_tables.py
"""

import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from siglip2_packed.workloads import SMALL_PACKS, WORKLOADS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PICTURES = ROOT / "docs" / "pictures"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def cpu_encoder() -> str:
    tables = []
    for path in sorted(RESULTS.glob("cpu_encoder_*.csv")):
        every = pd.read_csv(path)
        rows = every[every["dtype"] == "float32"]
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
        half = every[every["dtype"] == "bfloat16"].set_index("metric")["p50"]
        if len(half):
            lines[-1] += (
                f" uniform256 in bfloat16: {half['time']:.0f} ms, {half['speedup_over_float32']:.1f}x float32 in turn "
                f"with it, relative error {half['relative_error']:.1e}."
            )
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
    table = table.reindex(columns=list(PROVIDERS))  # one may have been refused, or not be there
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
            times = attention_times(head_dim, path).dropna(axis=1, how="all")
            names = [PROVIDERS[provider] for provider in times]
            lines = [f"| head_dim {head_dim} | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
            for workload in times.index.unique(level=0):
                cells = []
                for provider in times:
                    pair = times.loc[workload][provider].reindex(["forward", "backward"])
                    cells.append("" if pair.isna().any() else " / ".join(f"{x:.0f}" for x in pair))
                name = workload.removesuffix(f"_k{head_dim}").removeprefix("len")
                lines.append(f"| {name} | {' | '.join(cells)} |")
            tables.append("\n".join(lines))
        tables.append(f"![attention](pictures/{path.stem}.png)")
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
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(PROVIDERS))
        figure.suptitle(f"Varlen attention, 16384 rows, 16 heads, bf16: {path.stem.split('_')[-1].upper()}")
        figure.savefig(PICTURES / f"{path.stem}.png", dpi=110)


ENCODERS = {
    "siglip2_packed": "packed",
    "transformers_sdpa_padded": "transformers, padded",
    "timm_naflexvit": "timm, padded",
    "transformers_cosmos3_edge": "Cosmos3Edge, packed",
    "seed_padded": "the seed's way",
    "gemm_chain": "its matrix products alone",
}
VARIANTS = {
    "siglip2_packed:cudagraph": "CUDA graphs",
    "transformers_sdpa_padded:cudagraph": "transformers' encoder in CUDA graphs",
    "siglip2_packed:compile": "compiled",
    "siglip2_packed:batch_invariant": "batch_invariant",
    "siglip2_packed:fp8": "fp8 in CUDA graphs",
}


def encoder() -> str:
    """A table a card, the latest run first."""
    return "\n\n".join(map(encoder_table, encoder_runs()))


def encoder_runs() -> list[pd.DataFrame]:
    runs = [pd.read_csv(path) for path in RESULTS.glob("encoder_*.csv")]
    return sorted(runs, key=lambda rows: rows.date.max(), reverse=True)


def encoder_values(rows: pd.DataFrame) -> pd.DataFrame:
    """Medians; index (workload, mode, metric), a column a provider."""
    return rows.pivot(index=["workload", "mode", "metric"], columns="provider", values="p50")


def headline() -> str:
    """Mixed images, in a sentence."""
    rows = encoder_runs()[0]
    values = encoder_values(rows)
    ours, theirs = (values[name]["mixed"] for name in ("siglip2_packed", "transformers_sdpa_padded"))
    forward, memory = ("forward", "time"), ("train", "peak_memory")
    return (
        f"**On an {rows.card[0]}, a forward of images of mixed sizes takes {ours[forward]:.0f} ms, padded"
        f" {theirs[forward]:.0f} (transformers).\nTraining on them takes {ours[memory]:.0f} GiB instead of"
        f" {theirs[memory]:.0f}.** (so400m, {rows['dtype'][0]}, {WORKLOADS['mixed']['images']} images of up to "
        f"{max(WORKLOADS['mixed']['budgets']):,} patches.)"
    )


def summary() -> str:
    """The latest run of the encoder beside padded transformers."""
    rows = encoder_runs()[0]
    first, values = rows.iloc[0], encoder_values(rows)
    lines = [
        f"{first.card}, so400m, {first['dtype']}, packed / transformers, padded; torch {first.torch}, triton "
        f"{first.triton}, transformers {first.transformers}, {first.date}",
        "",
        "| images | forward, ms | | training step, ms | | its peak, GiB | |",
        "|---" * 7 + "|",
    ]
    for workload in rows.workload.unique():
        cells = []
        for key in (("forward", "time"), ("train", "time"), ("train", "peak_memory")):
            ours, theirs = values.loc[(workload, *key), ["siglip2_packed", "transformers_sdpa_padded"]]
            ratio = f"{theirs / ours:.2f}x" if key[1] == "time" else f"{ours / theirs:.2f} of it"
            cells += [f"{decimals(ours)} / {decimals(theirs)}", ratio]
        lines.append(f"| {explained(workload).replace(chr(10), ', ')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def encoder_table(rows: pd.DataFrame) -> str:
    first = rows.iloc[0]
    values = encoder_values(rows)
    present = {key: label for key, label in ENCODERS.items() if key in values}
    floor = "over_floor" in rows.metric.values
    lines = [
        f"{first.card}, so400m, bfloat16, token features, ms (median) and peak GiB of training; "
        f"torch {first.torch}, triton {first.triton}, transformers {first.transformers}, {first.date}",
        "",
        f"| workload | {' | '.join(present.values())} | over transformers |{' over its floor |' if floor else ''}",
        "|---" * (len(present) + 2 + floor) + "|",
    ]
    for mode, metric in (("forward", "time"), ("train", "time"), ("train", "peak_memory")):
        for workload in rows.workload.unique():
            if (workload, mode, metric) not in values.index:
                continue
            row = values.loc[(workload, mode, metric)]
            digits = 2 if row["siglip2_packed"] < 10 else 1
            cells = ["" if pd.isna(row[key]) else f"{row[key]:.{digits}f}" for key in present]
            ratio = row["transformers_sdpa_padded"] / row["siglip2_packed"]
            ratio = f"{ratio:.2f}x" if metric == "time" else f"{1 / ratio:.2f} of it"
            unit = "GiB" if metric == "peak_memory" else mode
            cells.append(ratio)
            if floor:
                over = values["siglip2_packed"].get((workload, mode, "over_floor")) if metric == "time" else None
                cells.append(f"{over:.2f}x" if pd.notna(over) else "")
            lines.append(f"| {workload}, {unit} | {' | '.join(cells)} |")
    notes = []
    for (workload, mode), times in rows[rows.metric == "time"].groupby(["workload", "mode"], sort=False):
        times = times.set_index("provider")["p50"]
        notes += [f"{label} {workload} {mode} {times[key]:.2f} ms" for key, label in VARIANTS.items() if key in times]
    if notes:
        lines += ["", "Variants: " + "; ".join(notes) + "."]
    return "\n".join(lines)


SMALL = {
    "siglip2_packed": "packed",
    "siglip2_packed:cudagraph": "packed in graphs",
    "transformers_sdpa_padded": "transformers",
    "transformers_sdpa_padded:cudagraph": "transformers in graphs",
    "transformers_sdpa_padded:compile": "transformers, reduce-overhead",
}


def small_packs_times(path: Path) -> pd.DataFrame:
    """Medians in ms; index (workload, mode) as they were run, a column a provider."""
    rows = pd.read_csv(path)
    rows = rows[rows.metric == "time"]
    rows = rows[rows.workload.isin([*SMALL_PACKS, "random"])]
    times = rows.pivot(index=["workload", "mode"], columns="provider", values="p50").reindex(columns=list(SMALL))
    return times.loc[
        [key for key in itertools.product(rows.workload.unique(), ("forward", "train")) if key in times.index]
    ]


def long_segments() -> str:
    """Training, of ours and of transformers."""
    lines = []
    for path in sorted(RESULTS.glob("long_segments_*.csv")):
        rows = pd.read_csv(path)
        first = rows.iloc[0]
        lines.append(
            f"{first.card}, so400m, {first['dtype']}, training, medians; torch {first.torch}, triton {first.triton}, "
            f"transformers {first.transformers}, {first.date}\n\n"
            "| workload | packed | transformers, padded | over transformers | packed GiB | transformers GiB |\n"
            "|---|---|---|---|---|---|"
        )
        rows = rows[rows["mode"] == "train"].pivot(index="workload", columns=["metric", "provider"], values="p50")
        for workload in (name for name in WORKLOADS if name in rows.index):
            (ours, theirs), (own, other) = (
                [rows.loc[workload][metric][name] for name in ("siglip2_packed", "transformers_sdpa_padded")]
                for metric in ("time", "peak_memory")
            )
            lines.append(f"| {workload} | {ours:.1f} | {theirs:.1f} | {theirs / ours:.2f}x | {own:.1f} | {other:.1f} |")
    return "\n".join(lines)


def small_packs() -> str:
    """With the picture; nothing where nothing was measured."""
    parts = []
    for path in sorted(RESULTS.glob("small_packs_*.csv")):
        rows, times = pd.read_csv(path), small_packs_times(path)
        first, ours, theirs = rows.iloc[0], list(SMALL)[:2], list(SMALL)[2:4]
        ratios = [(x, y) for x, y in itertools.product(ours, theirs)]
        lines = [
            f"{first.card}, so400m, {first['dtype']}, token features, ms of a step (median); random: s of all packs, "
            f"captures included; torch {first.torch}, triton {first.triton}, transformers {first.transformers}, "
            f"{first.date}",
            "",
            f"| pack | {' | '.join(SMALL.values())} | {' | '.join(f'{SMALL[x]} over {SMALL[y]}' for x, y in ratios)} |",
            "|---" * (len(SMALL) + len(ratios) + 1) + "|",
        ]
        for (workload, mode), row in times.iterrows():
            scale = 1e3 if workload == "random" else 1
            cells = [decimals(row[key] / scale) for key in SMALL]
            cells += ["" if pd.isna(row[x] + row[y]) else f"{row[y] / row[x]:.2f}x" for x, y in ratios]
            lines.append(f"| {workload}, {mode} | {' | '.join(cells)} |")
        captures = (
            rows[(rows.metric == "capture_time") & (rows.workload != "random")].groupby("provider", sort=False).p50
        )
        if len(captures):
            texts = [f"{SMALL[key]} {x.min():.1f} to {x.max():.1f} s" for key, x in captures]
            lines += ["", f"Captures and compilation, beside these times: {'; '.join(texts)}."]
        over = rows[rows.metric == "over_pack1024"].set_index("mode").p50
        if len(over):
            texts = [f"{mode} {over[mode]:.2f}" for mode in over.index]
            lines += ["", f"A pack of 1,030 patches in graphs takes as long as one of 1,024 times: {', '.join(texts)}."]
        reserved = rows[rows.metric == "reserved_memory"].set_index("provider").p50
        if len(reserved) == 2:
            without, with_graphs = (reserved[key] for key in list(SMALL)[:2])
            lines += ["", f"Reserved to train at 4,096 patches: {without:.1f} GiB, in graphs {with_graphs:.1f}."]
        parts += ["\n".join(lines), f"![small packs](pictures/{path.stem}.png)"]
    return "\n\n".join(parts)


def vlm() -> str:
    """Nothing where nothing was measured."""
    tables = []
    for path in sorted(RESULTS.glob("vlm_*.csv")):
        rows = pd.read_csv(path)
        first, theirs, ours = rows.iloc[0], "transformers_sdpa_padded", "siglip2_packed"
        values = rows.pivot(index=["workload", "mode", "metric"], columns="provider", values="p50")
        values = values.reindex(columns=[theirs, ours])
        lines = [
            f"{first.card}, {first['dtype']}, ms of a step (median) and peak GiB; torch {first.torch}, triton "
            f"{first.triton}, transformers {first.transformers}, {first.date}",
            "",
            "| model | transformers' tower | packed | ratio | GiB | packed | ratio |",
            "|---" * 7 + "|",
        ]
        for workload, mode in itertools.product(rows.workload.unique(), ("forward", "train")):
            cells = []
            for metric in ("time", "peak_memory"):
                key = (workload, mode, metric)
                before, after = values.loc[key] if key in values.index else (float("nan"),) * 2
                ratio = before / after if metric == "time" else after / before
                cells += [decimals(before), decimals(after), "" if pd.isna(ratio) else f"{ratio:.2f}x"]
            if any(cells):
                lines.append(f"| {workload.replace('_', ' ')}, {mode} | {' | '.join(cells)} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def decimals(value: float) -> str:
    return "" if pd.isna(value) else f"{value:.{2 if value < 10 else 1}f}"


def plot_small_packs() -> None:
    """Bars of a colour an encoder; above ours in graphs how many times as fast as transformers it is."""
    import matplotlib.pyplot as plt

    for path in sorted(RESULTS.glob("small_packs_*.csv")):
        times = small_packs_times(path)
        times = times[times.index.isin(SMALL_PACKS, level=0)].dropna(axis="columns", how="all")
        figure, axes = plt.subplots(2, 1, figsize=(10, 8), layout="constrained")
        for axis, mode in zip(axes, ("forward", "train")):
            table = times.xs(mode, level="mode")
            over = table["transformers_sdpa_padded"] / table["siglip2_packed:cudagraph"]
            bars(axis, table, mode, "siglip2_packed:cudagraph", over)
            axis.set(ylabel="ms a step", yscale="log")
        figure.legend(axes[0].containers, [SMALL[name] for name in times], loc="outside lower center", ncols=5)
        card = path.stem.split("_")[-1].upper()
        figure.suptitle(f"Small packs, SigLIP2 so400m, bf16, {card}; above the bars: CUDA graphs over transformers")
        figure.savefig(PICTURES / f"{path.stem}.png", dpi=110)


def bars(axis, table: pd.DataFrame, mode: str, provider: str, over: pd.Series) -> None:
    """A group a workload; above the provider's bars how many times as fast it is."""
    table.plot.bar(ax=axis, rot=0, width=0.8, legend=False)
    labels = [f"{x:.2g}x" if pd.notna(x) else "" for x in over]
    axis.bar_label(axis.containers[list(table).index(provider)], labels=labels, fontsize=8)
    axis.set_title("forward" if mode == "forward" else "train: forward and backward", loc="left")
    axis.set(xlabel="")
    axis.set_xticks(range(len(table)), [explained(name) for name in table.index], fontsize=8)
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    axis.margins(y=0.1)


def plot_encoder() -> None:
    """Bars of a colour an encoder, in both panels; above ours how many times as fast as transformers it is."""
    import matplotlib.pyplot as plt

    for path in sorted(RESULTS.glob("encoder_*.csv")):
        rows = pd.read_csv(path)
        rows = rows[(rows.metric == "patches_per_s") & rows.provider.isin(ENCODERS)]
        workloads = [name for name in WORKLOADS if name in set(rows.workload)]
        providers = [name for name in ENCODERS if name in set(rows.provider)]
        figure, axes = plt.subplots(2, 1, figsize=(10, 8), layout="constrained")
        for axis, mode in zip(axes, ("forward", "train")):
            speed = rows[rows["mode"] == mode].pivot(index="workload", columns="provider", values="p50") / 1e3
            speed = speed.reindex(index=workloads, columns=providers)
            bars(axis, speed, mode, "siglip2_packed", speed["siglip2_packed"] / speed["transformers_sdpa_padded"])
            axis.set(ylabel="thousand patches/s, padding not counted")
        figure.legend(axes[0].containers, [ENCODERS[name] for name in providers], loc="outside lower center", ncols=5)
        card = path.stem.split("_")[-1].upper()
        figure.suptitle(f"SigLIP2 so400m encoder, bf16, {card}; above the bars: packed over transformers")
        figure.savefig(PICTURES / f"{path.stem}.png", dpi=110)


def explained(name: str) -> str:
    """A workload, its images, their patches and shapes."""
    workload = WORKLOADS[name]
    if "grids" in workload:
        sizes = [h * w for _, h, w in workload["grids"]]
        return f"{name}\n{len(sizes)} image{'s' * (len(sizes) > 1)}\n{sum(sizes):,} patches"
    images, budgets, frames = workload["images"], workload["budgets"], workload.get("frames", 1)
    what = f"{images} image{'s' * (images > 1)}" if frames == 1 else f"{images} videos, {frames} frames"
    patches = f"{min(budgets):,} to {max(budgets):,}" if len(budgets) > 1 else f"{budgets[0]:,}"
    ratio = workload["aspect_ratio_max"]
    shape = "square" if ratio == 1 else f"up to {ratio:g}:1"
    each = " a frame" if frames > 1 else " each" if images > 1 and len(budgets) == 1 else ""
    return f"{name}\n{what}\n{patches} patches{each}\n{shape}"


def train_tower() -> str:
    lines = [
        "| card, ranks | a step | ms | patches/s | MFU | peak GiB | efficiency | names of new crops |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for path in sorted(RESULTS.glob("train_tower_*.csv")):
        rows = pd.read_csv(path)
        for (provider, workload), values in rows.groupby(["provider", "workload"], sort=False):
            value = values.set_index("metric")["p50"].to_dict()
            shape, _, budget, *extra, ranks = workload.split("_")
            engine = provider.removeprefix("siglip2_packed:")
            step = f"{shape}, {budget.removeprefix('budget')} patches a rank, {engine}, {values.dtype.iloc[0]}"
            step += ", checkpointing" * ("checkpointing" in extra) + ", CUDA graphs" * ("graphs" in extra)
            share = {name: f"{value[name]:.2f}" if name in value else "" for name in ("mfu", "scaling_efficiency")}
            memory = f"{value['peak_memory']:.1f}" if "peak_memory" in value else ""
            lines.append(
                f"| {values.card.iloc[0]}, {ranks.removeprefix('ranks')} | {step} | {value['time']:.0f} "
                f"| {value['patches_per_s']:.0f} | {share['mfu']} | {memory} | {share['scaling_efficiency']} "
                f"| {names_right(value)} |"
            )
    return "\n".join(lines)


def names_right(value: dict[str, float]) -> str:
    """Rows of before 2026-11-30 say no chance. It was one in twelve names; their captions also told the grid."""
    chance, old = value.get("chance", 1 / 12), "" if "chance" in value else " *"
    if value["name_accuracy"] <= 2 * chance:
        return f"no better than chance ({chance:.2f}){old}"
    return f"{value['name_accuracy']:.2f}, chance {chance:.2f}{old}"


def bulk() -> str:
    lines = [
        "| 5,000 JPEGs, or photos | transformers' loop | encode | of decoding and resizing alone | of the model alone "
        "| device waits | packs full |",
        "|---|---|---|---|---|---|---|",
    ]
    for path in sorted(RESULTS.glob("bulk_*.csv")):
        rows = pd.read_csv(path)
        for (workload, dtype), values in rows.groupby(["workload", "dtype"], sort=False):
            value = values.set_index(["provider", "metric"])["p50"]
            theirs = value.get(("transformers_sdpa_padded", "images_per_s"))
            images, _, limit = workload.partition("_max")
            name = f"{values.card.iloc[0]}, {dtype}" + (f", up to {limit} patches" if limit else "")
            if not images.startswith("jpegs"):
                name += f", {images.partition('mp')[2]} photos of 12 megapixels"
            for way in ("", ":scaled", ":gpu"):
                if ("siglip2_packed" + way, "images_per_s") not in value:
                    continue
                ours = value["siglip2_packed" + way]
                shares = ("share_of_decode_resize", "share_of_forward", "device_wait", "pack_utilisation")
                cells = " | ".join(f"{ours[share]:.0%}" if share in ours else "" for share in shares)
                how = f", `--decode {way[1:]}`" if way else ""
                lines.append(f"| {name}{how} | {theirs:.0f}/s | {ours['images_per_s']:.0f}/s | {cells} |")
    return "\n".join(lines)


def many_ranks() -> str:
    lines = []
    for path in sorted(RESULTS.glob("many_ranks_*.csv")):
        rows = pd.read_csv(path)
        value = rows.pivot(index="workload", columns="metric", values="p50")
        images = int(rows.workload[0].split("_images")[1].split("_")[0])
        lines += [
            f"{rows.card[0]}, {images:,} images as in workload mixed, {rows.date[0]}",
            "",
            "| plan | ranks | s | GiB | batches, or inputs of a shard | full | slowest or busiest rank over mean |",
            "|---" * 7 + "|",
        ]
        for workload in rows.workload.unique():
            row, (name, ranks) = value.loc[workload], workload.split(f"_images{images}_ranks")
            count, over = row[["batches", "shard_size"]].max(), row[["whole_epoch", "busiest_over_mean"]].max()
            name = name.replace("sampler_budget", "sampler, budget ").replace("_", ", ")
            full = "" if pd.isna(row.utilisation) else f"{row.utilisation:.3f}"
            took = f"{row.plan_time:.2f} | {row.memory:.2f}"
            lines.append(f"| {name} | {int(ranks):,} | {took} | {count:,.0f} | {full} | {over:.3f} |")
    return "\n".join(lines)


WAYS = {
    "fsdp": "FSDP2",
    "fsdp_units3": "FSDP2, three layers a unit",
    "fsdp_loader": "FSDP2, packs made beside it",
    "balance": "the tower alone, images as in `mixed`",
    "ddp": "DDP",
    "ddp_graphs": "DDP, CUDA graphs",
}


def scaling() -> str:
    """What a step of training loses on several ranks; ms of the mean rank, from a profile."""
    lines = []
    for path in sorted(RESULTS.glob("scaling_*.csv")):
        rows = pd.read_csv(path)
        lines += [
            f"{rows.card[0]}, so400m, {rows.dtype[0]}; torch {rows.torch[0]}, {rows.date[0]}",
            "",
            "| patches a rank | training | ranks | patches/s | MFU | peak GiB | efficiency | compute | transfers alone "
            "| waiting for a rank | idle | slowest rank over mean |",
            "|---" * 12 + "|",
        ]
        value = rows.pivot(index=["provider", "workload"], columns="metric", values="p50")
        for provider, workload in rows[["provider", "workload"]].drop_duplicates().itertuples(index=False):
            row, (_, _, budget, ranks) = value.loc[provider, workload], workload.split("_")
            way = WAYS[provider.removeprefix("siglip2_packed:")]
            parts = " | ".join(f"{row[f'device_{part}']:.1f}" for part in ("compute", "transfer", "wait", "idle"))
            efficiency = "" if pd.isna(row.efficiency) else f"{row.efficiency:.2f}"
            lines.append(
                f"| {int(budget.removeprefix('budget')):,} | {way} | {ranks.removeprefix('ranks')} "
                f"| {row.patches_per_s:,.0f} | {row.mfu:.2f} | {row.peak_memory:.1f} | {efficiency} | {parts} "
                f"| {row.slowest_over_mean:.3f} |"
            )
    return "\n".join(lines)


def encode_ranks() -> str:
    lines = []
    for path in sorted(RESULTS.glob("encode_ranks_*.csv")):
        rows = pd.read_csv(path)
        lines += [
            f"{rows.card[0]}, so400m, {rows.dtype[0]}; torch {rows.torch[0]}, {rows.date[0]}",
            "",
            "| 20,000 JPEGs | ranks | images/s | efficiency | rows against one rank's |",
            "|---" * 5 + "|",
        ]
        value = rows.pivot(index="workload", columns="metric", values="p50")
        for workload in rows.workload.unique():
            row, (_, decode, *invariant, ranks) = value.loc[workload], workload.split("_")
            name = f"`--decode {decode}`" + ", `--batch-invariant`" * bool(invariant)
            efficiency = "" if pd.isna(row.efficiency) else f"{row.efficiency:.2f}"
            error = row.relative_error
            same = "" if pd.isna(error) else "equal to the bit" if error == 0 else f"relative error {error:.0e}"
            rank = ranks.removeprefix("ranks")
            lines.append(f"| {name} | {rank} | {row.images_per_s:,.0f} | {efficiency} | {same} |")
    return "\n".join(lines)


IMAGE_COSTS = {
    "forward": ("siglip2_packed", "forward"),
    "in graphs": ("siglip2_packed:cudagraph", "forward"),
    "fp8, in graphs": ("siglip2_packed:fp8", "forward"),
    "training": ("siglip2_packed", "train"),
    "training, in graphs": ("siglip2_packed:cudagraph", "train"),
}
PACK_COSTS = {name: IMAGE_COSTS[name] for name in ("forward", "fp8, in graphs", "training")}


def planning_parts(workload: str) -> list[str]:
    """`224x224_max196_grid14x14_images83` -> 224x224, 196, 14x14, 83."""
    return re.findall(r"\d[\dx]*", workload)


def sides(text: str) -> list[int]:
    return [int(side) for side in text.split("x")]


def planning_order(workload: str) -> tuple[bool, int]:
    """Squares first, by their size; then photographs, by their budgets."""
    (w, h), limit = sides(planning_parts(workload)[0]), int(planning_parts(workload)[1])
    return w != h, limit


def planning() -> str:
    """A table of one image, and one of full packs; nothing where nothing was measured."""
    parts = []
    for path in sorted(RESULTS.glob("planning_*.csv")):
        rows = pd.read_csv(path)
        rows = rows[rows.metric != "not_run"]
        first, values = rows.iloc[0], rows.set_index(["workload", "provider", "mode", "metric"]).p50

        def cells(workload: str, costs: dict[str, tuple[str, str]], images: int) -> Iterator[str]:
            for key in costs.values():
                ms = values.get((workload, *key, "time"), float("nan"))
                yield decimals(ms) + (f" ({images / ms * 1e3:,.0f}/s)" if images > 1 and pd.notna(ms) else "")
            for key in PACK_COSTS.values():
                yield decimals(values.get((workload, *key, "peak_memory"), float("nan")))

        one, packs = [], []
        for workload in sorted(rows.workload.unique(), key=planning_order):
            size, limit, grid, images = planning_parts(workload)
            kind, count, patches = f"| {size.replace('x', '×')} | {int(limit):,}", int(images), math.prod(sides(grid))
            if count == 1:
                grid = grid.replace("x", "×")
                one.append(f"{kind} | {grid} | {patches:,} | {' | '.join(cells(workload, IMAGE_COSTS, 1))} |")
            else:
                packs.append(f"{kind} | {count} | {' | '.join(cells(workload, PACK_COSTS, count))} |")
        memory = [f"GiB, {name.partition(',')[0]}" for name in PACK_COSTS]
        tables = {
            "One image, ms and GiB:": (["image", "budget", "grid", "patches", *IMAGE_COSTS, *memory], one),
            "A full pack, ms (images a second) and GiB:": (
                ["image", "budget", "images", *PACK_COSTS, *memory], packs),
        }  # fmt: skip
        parts.append(
            f"{first.card}, so400m, bfloat16, medians; torch {first.torch}, triton {first.triton}, {first.date}"
        )
        for title, (head, lines) in tables.items():
            parts += [title, "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *lines])]
    return "\n\n".join(parts)


TABLES = {
    "headline": headline,
    "summary": summary,
    "attention": attention,
    "encoder": encoder,
    "long_segments": long_segments,
    "small_packs": small_packs,
    "vlm": vlm,
    "cpu_encoder": cpu_encoder,
    "train_tower": train_tower,
    "bulk": bulk,
    "many_ranks": many_ranks,
    "scaling": scaling,
    "encode_ranks": encode_ranks,
    "planning": planning,
}


def render(page: str) -> str:
    for name in re.findall(r"^<!-- table: (\w+) -->$", page, flags=re.MULTILINE):
        block = f"<!-- table: {name} -->\n{TABLES[name]()}\n<!-- end -->"
        page = re.sub(rf"<!-- table: {name} -->\n.*?<!-- end -->", lambda _: block, page, flags=re.DOTALL)
    return page


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(render(page.read_text()))
    plot_attention()
    plot_encoder()
    plot_small_packs()
