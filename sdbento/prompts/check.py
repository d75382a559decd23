"""What is wrong with a request's prompts, as far as that can be told without loading a model.

What depends on the model's tokenizers and the widths of its text encoders is refused by
`tokens.prepare`.
"""

from __future__ import annotations

from sdbento.catalog.families import Family
from sdbento.catalog.specs import ModelSpec
from sdbento.errors import InvalidParameter
from sdbento.prompts.inversions import Inversion, Inversions
from sdbento.prompts.syntax import parse_attention, schedule


def encoder_indices(spec: ModelSpec) -> tuple[int, ...]:
    """The indices of a model's text encoders: SDXL has 0 and 1, its refiner 1, the others 0."""
    if spec.family is not Family.SDXL:
        return (0,)
    return (1,) if spec.refines else (0, 1)


def check_second_prompt(spec: ModelSpec, *, param: str = "prompt_2") -> None:
    """Raise InvalidParameter where the request's field `param`, a prompt for the second text
    encoder, is given to a model that has none."""
    if 1 not in encoder_indices(spec):
        raise InvalidParameter(
            f"{param} is for SDXL models, which have two text encoders; {spec.name} is not one",
            param=param,
        )


def check_inversions(text: str, spec: ModelSpec, num_steps: int, inversions: Inversions) -> None:
    """Read the textual inversions that a prompt names, and compare them with the model's family.

    Blocking where a file has to be read. `num_steps` decides which words `[from:to:when]` leaves
    out. Raises InvalidParameter for a file that cannot be read, that is no textual inversion, or
    that has vectors for other text encoders than the model's.
    """
    for _, words in schedule(text, num_steps):
        for span in parse_attention(words):
            for piece in inversions.split(span.text or ""):
                if isinstance(piece, Inversion):
                    piece.check_encoders(encoder_indices(spec))
