"""Puts the README's tables between their markers, from the committed results.

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


TABLES = {"cpu_encoder": cpu_encoder}


def render(readme: str) -> str:
    for name, table in TABLES.items():
        block = f"<!-- table: {name} -->\n{table()}\n<!-- end -->"
        readme = re.sub(rf"<!-- table: {name} -->\n.*?<!-- end -->", lambda _: block, readme, flags=re.DOTALL)
    return readme


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(render(path.read_text()))
