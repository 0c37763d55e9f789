"""What `eval.speed` measured, as text for a terminal."""

from typing import Any


def describe(results: dict[str, Any]) -> str:
    """The results as text for a terminal."""
    lines = [f"shape {results['shape']['name']}, {results['shape']['parameters'] / 1e6:.1f}M parameters"]
    if "bandwidth_gb_per_s" in results:
        kinds = ", ".join(f"{name} {rate:.1f}" for name, rate in results["bandwidth_by_kind_gb_per_s"].items())
        best = results["bandwidth_best_gb_per_s"]
        lines.append(f"bandwidth          {results['bandwidth_gb_per_s']:.1f} GB/s ({kinds}; best round {best:.1f})")
    if "plain" in results:
        plain = results["plain"]
        share = plain["bandwidth_share"]
        lines.append(f"plain decoding     {plain['ms_per_token']:.2f} ms/token, {share:.0%} of the bandwidth")
    for name, cache in (("huggingface", "dynamic"), ("huggingface_static", "static")):
        if results.get(name):
            text = f"transformers       {results[name]['ms_per_token']:.2f} ms/token, {cache} cache"
            if "plain" in results:
                ratio = results[name]["ms_per_token"] / results["plain"]["ms_per_token"]
                text += f"; plain decoding here is {ratio:.2f}x as fast"
            lines.append(text)
        elif name in results:
            lines.append("transformers       not installed")
    if "rows" in results:
        lines.append("forward, ms        " + "  ".join(f"{row['rows']}: {row['ms']:.2f}" for row in results["rows"]))
    for name, entry in results.get("drafters", {}).items():
        pieces = " + ".join(f"{part} {entry[f'{part}_ms']:.2f}" for part in ("draft", "verify", "commit", "update"))
        lines.append(f"{name:<18} step {entry['step_ms']:.2f} ms ({pieces} alone), {entry['tree_nodes']} rows")
        text = f"{'':<18} judge + commit + learn {entry['overhead_share']:.1%} of a step"
        if "sampled" in entry:
            text += f", {entry['sampled']['overhead_share']:.1%} at temperature 1 with top-p 0.9"
        lines.append(text)
        lines.append(
            f"{'':<18} {entry['step_over_forwards']:.2f}x its forwards (target {entry['forward_ms']:.2f} + network "
            f"{entry['network_ms']:.2f} ms), loop efficiency {entry['loop_efficiency']:.0%}"
        )
    for row in results.get("replay", []):
        lines.append(
            f"replay, {row['nodes']:>3} rows   {row['ms_per_token']:.2f} ms/token, {row['acceptance_length']:.2f} "
            f"tokens a step, {row['speedup']:.2f}x, loop efficiency {row['loop_efficiency']:.0%}"
        )
    for row in results.get("growth", []):
        pieces = ", ".join(f"{name} {entry['step_ms']:.1f}" for name, entry in row["drafters"].items())
        lines.append(f"batch {row['batch']:>2}, context {row['context']:>4}, ms per step: {pieces}")
    return "\n".join(lines)
