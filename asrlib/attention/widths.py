"""The widths that a latent may have. Imports no torch, so that a wrong width is refused at once."""

LAYOUTS = ("joint", "split")


def check_latent_dim(latent_dim: int, width: int, layout: str, key_dim: int | None = None) -> None:
    """Raises ValueError unless a latent of `latent_dim` numbers can serve keys and values of `width`.

    Keys and values are `width` numbers each, so a latent wider than both together saves nothing; a split
    latent needs one number for either. `key_dim` says how many of a split latent's numbers are the keys'.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}: choose one of {', '.join(LAYOUTS)}")
    least = 2 if layout == "split" else 1
    if not least <= latent_dim <= 2 * width:
        raise ValueError(
            f"latent_dim is {latent_dim}, but a {layout} latent of a model of width {width} has between {least} "
            f"and {2 * width} numbers per frame (2 x {width} is what keys and values take uncompressed)"
        )
    if key_dim is None:
        return
    if layout == "joint":
        raise ValueError(
            f"latent_key_dim is {key_dim}, but keys and values share all of a joint latent: leave it out, or use "
            "layout: split"
        )
    fewest, most = max(1, latent_dim - width), min(width, latent_dim - 1)
    if not fewest <= key_dim <= most:
        raise ValueError(
            f"latent_key_dim is {key_dim}, but of a latent of {latent_dim} numbers the keys take between {fewest} and "
            f"{most} (in a model of width {width}, keys and values have 1 to {width} each)"
        )


def split_ranks(latent_dim: int) -> tuple[int, int]:
    """(rank for keys, rank for values) of a split latent in halves; of an odd width, the values get one more."""
    return latent_dim // 2, latent_dim - latent_dim // 2
