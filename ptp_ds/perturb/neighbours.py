"""Near words: tokens whose input embeddings in the frozen backbone point in nearly the same direction (cosine).

A word here is one token of two or more letters that begins a word of the text, is no function word, and is not merely
the beginning of longer words ("discrep"). Only words of one kind are each other's neighbours: of one script, and all
lower case, capitalised, all upper case, or without case. Scripts that write no spaces have no words here.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from tokenizers.decoders import ByteLevel
from torch import Tensor

from ptp_ds.backbone.backbone import Backbone
from ptp_ds.tasks.words import unspaced

OTHER, BARE, WORD = 0, 1, 2  # kinds of tokens: anything else, punctuation or spaces alone, from here on words
_SPACE_MARKERS = _OF_BYTES, _OF_PIECES = "\u0120", "\u2581"  # byte-level BPE's and sentencepiece's
_CONTINUES = "##"  # WordPiece's
_SPACES = "\u0120\u010a\u0109\u010d\u2581 \t\n\r"  # as vocabularies store them
_CASES = (str.islower, str.istitle, str.isupper, lambda body: body.lower() == body.upper())
_DECODER = ByteLevel()
_CHUNK = 16384  # embeddings that are compared at a time
_TOKENS = 512  # tokens whose neighbours are looked for at a time
_SPARE = 8  # more than asked for, compared again in double precision
# A2T leaves stop words alone as well: swapping them turns sentences round, or breaks them. English's alone are known.
_FUNCTION_WORDS = frozenset(re.findall("[a-z]+", """
    about above after again against all am an and any are as at be because been before being below between both but by
    can cannot could did do does doing down during each few for from further had has have having he her here hers him
    his how if in into is it its itself just less me might more most must my neither never no nobody none nor not
    nothing now of off on once one only or other our out over own per shall she should since so some such than that
    the their them then there these they this those though through to too under until up upon us very via was we were
    what when where whether which while who whom whose why will with within without would yes yet you your
"""))  # fmt: skip


@dataclass(frozen=True)
class Vocabulary:
    """Each token's kind (OTHER, BARE, WORD and up) and its text, with a space where it begins a word.

    in_bytes: whether texts hold a character for each byte, as byte-level BPE stores them.
    """

    kinds: Sequence[int]
    texts: Sequence[str]
    in_bytes: bool = False

    def text(self, token_ids: Iterable[int]) -> str:
        """The tokens' text in lower case."""
        texts = [self.texts[token] for token in token_ids if token < len(self.texts)]
        return (_DECODER.decode(texts) if self.in_bytes else "".join(texts)).lower()

    def kind(self, token: int) -> int:
        """OTHER, too, for rows of the embedding that have no token."""
        return self.kinds[token] if token < len(self.kinds) else OTHER

    @cached_property
    def members(self) -> dict[int, list[int]]:
        """The tokens of each kind of words."""
        found: dict[int, list[int]] = {}
        for token, kind in enumerate(self.kinds):
            if kind >= WORD:
                found.setdefault(kind, []).append(token)
        return found


def vocabulary_of(tokenizer: Any) -> Vocabulary:
    """Kinds and texts of a tokenizer's tokens; special and added ones are OTHER."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    marked = _marked(tokens)
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    stored = [(True, "") if n in special else _split(token or "", marked) for n, token in enumerate(tokens)]
    in_bytes = marked and _count(tokens, _OF_BYTES) > _count(tokens, _OF_PIECES)
    parts = [(begins, _DECODER.decode([body])) for begins, body in stored] if in_bytes else stored
    pieces = _beginnings(body.lower() for begins, body in parts if begins and _lettered(body))
    numbers = {("LATIN", case): WORD + case for case in range(len(_CASES))}
    kinds = [OTHER if body.lower() in pieces else _kind(body, begins, numbers) for begins, body in parts]
    kinds = [BARE if token and not token.strip(_SPACES) else kind for token, kind in zip(tokens, kinds, strict=True)]
    space = _OF_BYTES if in_bytes else " "
    return Vocabulary(kinds, [space * begins + body for begins, body in stored], in_bytes)


def _marked(tokens: Sequence[str | None]) -> bool:
    """Whether the vocabulary marks what begins a word, not what goes on with one: by which of the two more words have.

    A WordPiece vocabulary may hold a marker as a mere character, and any other "##" as punctuation.
    """
    return sum(_count(tokens, marker) for marker in _SPACE_MARKERS) > _count(tokens, _CONTINUES)


def _count(tokens: Sequence[str | None], mark: str) -> int:
    """Words that begin with a mark."""
    return sum(token.startswith(mark) and _lettered(token.removeprefix(mark)) for token in tokens if token)


def _split(token: str, marked: bool) -> tuple[bool, str]:
    """(whether the token begins a word, its characters)."""
    if marked:
        begins = token.startswith(_SPACE_MARKERS)
        return begins, token[1:] if begins else token
    return not token.startswith(_CONTINUES), token.removeprefix(_CONTINUES)


def _lettered(body: str) -> bool:
    return len(body) >= 2 and body[0].isalpha() and not unspaced(body[0]) and all(map(is_letter, body))


def is_letter(character: str) -> bool:
    """Whether it is a letter or stands on one, as vowel signs and accents do."""
    return character.isalpha() or unicodedata.category(character).startswith("M")


def _beginnings(bodies: Iterable[str]) -> set[str]:
    """Those that others of them continue, all with the same letter (whatever its accent), and not as inflections do:
    with an s or with ly."""
    known = set(bodies)
    following: dict[str, set[str]] = {}
    for body in known:
        for end in range(2, len(body)):
            if body[:end] in known:
                following.setdefault(body[:end], set()).add(unicodedata.normalize("NFD", body[end])[0])
    return {body for body, letters in following.items() if len(letters) == 1 and not letters & {"s", "l"}}


def _kind(body: str, begins: bool, numbers: dict[tuple[str, int], int]) -> int:
    """A token's kind. numbers: the kinds of words met so far, by script and case."""
    if body and body.isascii() and not any(character.isalnum() for character in body):
        return BARE
    case = next((case for case, holds in enumerate(_CASES) if holds(body)), None)
    if case is None or not begins or not _lettered(body) or body.lower() in _FUNCTION_WORDS:
        return OTHER
    script = unicodedata.name(body[0], "").split(" ")[0]
    return numbers.setdefault((script, case), WORD + len(numbers))


class Neighbours:
    """The nearest words of words, each looked for once: at most `count`, of cosine `min_cosine` or more.

    Holds nothing that a checkpoint needs: a token's neighbours are the same whenever and beside whichever others they
    are looked for.
    """

    def __init__(self, vocabulary: Vocabulary, count: int, min_cosine: float) -> None:
        self.vocabulary, self.count, self.min_cosine = vocabulary, count, min_cosine
        self._known: dict[int, list[int]] = {}

    def of(self, backbone: Backbone, tokens: Iterable[int]) -> dict[int, list[int]]:
        """Each token's neighbours, nearest first. Call it inside of backbone.shards.outside_layers() where ranks
        differ."""
        wanted = set(tokens)
        new = sorted(wanted - self._known.keys())
        for kind, members in self.vocabulary.members.items():
            mine = [token for token in new if self.vocabulary.kind(token) == kind]
            for start in range(0, len(mine), _TOKENS):
                self._known.update(self._search(backbone, mine[start : start + _TOKENS], members))
        return {token: self._known.get(token, []) for token in wanted}

    def _search(self, backbone: Backbone, mine: list[int], members: list[int]) -> dict[int, list[int]]:
        """Neighbours of the tokens `mine` among `members`, those of their kind."""
        sought = torch.tensor(mine, device=backbone.device)
        pool = torch.tensor(members, device=backbone.device)
        own = torch.nn.functional.normalize(backbone.embed(sought).float(), dim=-1)
        best, ids = own.new_empty(len(mine), 0), sought.new_empty(len(mine), 0)
        for part in pool.split(_CHUNK):
            embeds_NH = backbone.embed(part).float()
            cosines = own @ embeds_NH.T / embeds_NH.norm(dim=-1).clamp_min(1e-30)
            cosines.masked_fill_(part[None] == sought[:, None], float("-inf"))
            best = torch.cat([best, cosines], dim=1)
            ids = torch.cat([ids, part.expand(len(mine), -1)], dim=1)
            best, places = best.topk(min(self.count + _SPARE, best.shape[1]), dim=1)
            ids = ids.gather(1, places)
        exact = _exact_cosines(backbone, sought, ids)
        found = {}
        for token, numbers, values in zip(mine, ids.tolist(), exact.tolist(), strict=True):
            near = sorted((-value, number) for number, value in zip(numbers, values, strict=True) if number != token)
            found[token] = [number for value, number in near if -value >= self.min_cosine][: self.count]
        return found


def _exact_cosines(backbone: Backbone, sought_N: Tensor, ids_NK: Tensor) -> Tensor:
    """[N, K] cosines in double precision, each summed by itself: no token's depend on which others were asked for."""
    own, near = backbone.embed(sought_N).double()[:, None], backbone.embed(ids_NK).double()
    products = (own * near).sum(-1)
    return products / (own.square().sum(-1) * near.square().sum(-1)).sqrt().clamp_min(1e-30)
