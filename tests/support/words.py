"""Words for made-up vocabularies."""


def letters(number: int) -> str:
    """A word of its own for each number: no two begin alike."""
    return "abcdefghijklm"[number // 10] + "qrstuvwxyz"[number % 10] + "oo"
