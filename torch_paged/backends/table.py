"""The README's support table, made from each backend's limits: ``python -m torch_paged.backends.table``."""

from torch_paged.backends import discover


def support_table() -> str:
    """Return the table in Markdown: a row per feature, a column per backend."""
    infos = list(discover().values())
    features = list(dict.fromkeys(feature for info in infos for feature in info.limits))
    rows = [["", *(info.name for info in infos)], ["---"] * (len(infos) + 1)]
    rows += [[feature, *(info.limits.get(feature, "no") for info in infos)] for feature in features]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    print(support_table())
