"""Which tokens of a text are one word: what is masked, attacked and counted as one."""

import unicodedata
from collections.abc import Sequence

# Scripts that write no spaces between words, by the beginnings of their characters' names.
_UNSPACED = (
    "BOPOMOFO ", "CJK ", "HALFWIDTH KATAKANA", "HIRAGANA", "IDEOGRAPHIC ", "KATAKANA", "KHMER ", "LAO ", "MYANMAR ",
    "NEW TAI LUE ", "TAI ", "THAI ", "TIBETAN ", "YI ",
)  # fmt: skip


def words_of_tokens(context: str, offsets: Sequence[tuple[int, int]], fields: Sequence[str | None]) -> list[int]:
    """Each token's word, counted from 0.

    A word begins behind a space or with one, and with each letter of a script that writes no spaces. Tokens that share
    a character, as those of single bytes do, are of one word; spaces alone are of the one that follows in their field.
    """
    words: list[int] = []
    word, reached, blank = 0, 0, True  # blank: nothing but spaces so far
    for place, (start, end) in enumerate(offsets):
        if place and end > start >= reached and _begins(context, start):
            goes_on = blank and fields[place] == fields[place - 1]
            word, blank = (word, blank) if goes_on else (word + 1, True)
        blank = blank and not context[start:end].strip()
        reached = max(reached, end)
        words.append(word)
    return words


def _begins(context: str, start: int) -> bool:
    """Whether a word begins at this character of the text."""
    before, first = context[max(0, start - 1) : start], context[start]
    if not before or before.isspace() or first.isspace():
        return True
    return first.isalnum() and (unspaced(first) or unspaced(before))


def unspaced(character: str) -> bool:
    """Whether the character is of a script without spaces, or of its punctuation."""
    if character.isascii():
        return False
    wide = unicodedata.east_asian_width(character) in ("F", "W") and unicodedata.category(character).startswith("P")
    return wide or unicodedata.name(character, "").startswith(_UNSPACED)
