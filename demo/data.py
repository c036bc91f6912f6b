"""Rule-based generators of the demo model's training and test data.

A turn is a question and its answer; a dialog is a system prompt (or None) and a list of turns; a
story is one line of text. All of them are drawn from a ``random.Random``, so a seed gives the same
text everywhere.

``held_out`` keeps test questions out of training: pairs of numbers, words, names, and wordings of
each fact. Reading order: the tables, the turns, ``dialog`` and ``story``, ``TESTS``.
"""

import random
import re
import zlib
from collections.abc import Callable

Turn = tuple[str, str]
Dialog = tuple[str | None, list[Turn]]


def held_out(*key: object, one_in: int) -> bool:
    """Whether ``key`` is for testing only: a fixed choice of one in ``one_in``."""
    return zlib.crc32("|".join(map(str, key)).encode()) % one_in == 0


# --- Tables -----------------------------------------------------------------------------------

WORDS = sorted(
    set(
        """
    anchor ant apple attic bag banana barn basket beach bean bear bed bee bell bench bird
    blanket boat book bottle box bread bridge broom brown brush bucket bus butter button cabin
    cake camel candle car carpet carrot castle cat cave cellar chair cheese cherry church circle
    clock cloud coat coffee coin cookie copper corn cotton cow cup curtain dance desert desk
    doctor dog donkey door dragon dress drum eagle egg engine fence field finger fish flag floor
    flower flute forest friend frog game garden gate ghost glass gold goose grape grass guitar
    hammer hand harbor hat hill hole honey horse hotel house ice insect iron island jacket jelly
    jungle key king kitchen kite knife ladder lake lamp leaf leg lemon letter light lion mask
    meadow melon milk mirror money monkey moon mouse mouth museum music nest night nose number
    ocean office onion orange oven owl paint palace paper parrot path peach pen pencil pepper
    piano pig pillow pilot planet plate pocket pond potato prince pumpkin puzzle queen rabbit
    rain ribbon rice ring river road robot rocket roof root rope rose saddle salt sand school
    seed shadow sheep shell ship shirt shoe shop silver sister sky sleep smile snake snow soap
    sock song soup spider spoon spring square stair star station stone store storm street sugar
    summer sun table tail tea teacher temple tent tiger ticket tomato tooth tower town train
    tree truck tunnel turtle umbrella uncle valley vase velvet village violin voice wagon wall
    wallet water wave whale wheat wheel wind window winter wolf wood yard yellow zebra
    """.split()
    )
)
NAMES = sorted(
    set(
        """
    Adam Alice Amir Anna Bella Ben Bob Bruno Carl Celia Chris Clara Dario David Diana Dora Ella
    Elsa Emma Eric Felix Fiona Frank Fred George Gina Grace Greta Hanna Hector Henry Hugo Ida
    Ines Iris Ivan Jack Jasper Jonas Julia Karla Kate Kevin Kira Laura Lena Leo Linus Mark Max
    Maya Mila Nico Nina Noah Nora Olga Olivia Oscar Otto Pablo Paul Peter Pia Quinn Ralf Rita
    Rosa Ruth Sam Sara Simon Stella Tara Theo Tina Tom Ulla Uma Ursula Vera Victor Vincent Viola
    Walter Wendy Will Willa Yara Zoe
    """.split()
    )
)

# topic: (facts, ways to ask, the answer)
FACTS: dict[str, tuple[dict[str, str], list[str], str]] = {
    topic: (dict(pair.split(":") for pair in known.split()), wordings, answer)
    for topic, known, wordings, answer in [
        (
            "capital",
            """France:Paris Italy:Rome Spain:Madrid Germany:Berlin Japan:Tokyo Egypt:Cairo
            Greece:Athens Norway:Oslo Russia:Moscow China:Beijing Poland:Warsaw Peru:Lima
            Kenya:Nairobi Cuba:Havana England:London Austria:Vienna""",
            [
                "What is the capital of {k}?",
                "What's the capital of {k}?",
                "Which city is the capital of {k}?",
                "Do you know the capital of {k}?",
                "Tell me the capital of {k}.",
                "Name the capital of {k}.",
                "capital of {k}?",
            ],
            "The capital of {k} is {v}.",
        ),
        (
            "sound",
            """cow:moo dog:woof cat:meow duck:quack sheep:baa lion:roar pig:oink horse:neigh
            bee:buzz snake:hiss owl:hoot frog:ribbit""",
            [
                "What sound does a {k} make?",
                "What noise does a {k} make?",
                "Which sound does a {k} make?",
                "What does a {k} say?",
                "How does a {k} sound?",
                "Tell me the sound of a {k}.",
            ],
            "A {k} says {v}.",
        ),
        (
            "color",
            """grass:green snow:white blood:red coal:black sky:blue lemon:yellow carrot:orange
            chocolate:brown""",
            [
                "What color is {k}?",
                "What is the color of {k}?",
                "Which color is {k}?",
                "Which color does {k} have?",
                "Do you know the color of {k}?",
                "Tell me the color of {k}.",
            ],
            "The color of {k} is {v}.",
        ),
        (
            "opposite",
            """hot:cold big:small day:night up:down fast:slow old:young happy:sad open:closed
            wet:dry light:dark left:right good:bad hard:soft long:short rich:poor full:empty""",
            [
                "What is the opposite of {k}?",
                "What's the opposite of {k}?",
                "Which word is the opposite of {k}?",
                "Do you know the opposite of {k}?",
                "Tell me the opposite of {k}.",
                "Opposite of {k}?",
            ],
            "The opposite of {k} is {v}.",
        ),
    ]
}
FACT_LIST = [(topic, key) for topic, (known, _, _) in FACTS.items() for key in known]

SUM_WORDINGS = [
    "What is {a} + {b}?",
    "What's {a} + {b}?",
    "What is {a} plus {b}?",
    "How much is {a} + {b}?",
    "How much is {a} plus {b}?",
    "Add {a} and {b}.",
    "Please add {a} to {b}.",
    "Can you add {a} and {b}?",
    "Calculate {a} + {b}.",
    "Tell me the sum of {a} and {b}.",
    "{a} + {b} = ?",
    "{a} + {b}",
]
REPEAT_WORDINGS = [
    "Repeat the word {w}.",
    "Please repeat {w}.",
    "Repeat after me: {w}",
    "Repeat: {w}",
    "Say {w}.",
    "Can you say {w}?",
]
SPELL_WORDINGS = [
    "Spell the word {w}.",
    "Spell the word {w} letter by letter.",
    "Spell {w}.",
    "Please spell {w}.",
    "Can you spell {w}?",
    "How do you spell {w}?",
]
INTRODUCTIONS = [
    "My name is {n}.",
    "Hi, my name is {n}.",
    "Hello, I am {n}.",
    "I am {n}.",
    "I'm {n}.",
    "You can call me {n}.",
]
NAME_QUESTIONS = [
    "What is my name?",
    "What's my name?",
    "Who am I?",
    "Do you know my name?",
    "Do you remember my name?",
    "Tell me my name.",
]
# statements (every opening with every ending), and the answer
GREETINGS = [
    (
        [a + b for a in ("Hello", "Hi", "Hey", "Good morning", "Good day", "Good evening")
         for b in ("", "!", ".", " there!", " there", ", my friend!", " again!")],
        "Hello! How can I help you?",
    ),
    (
        [a + b for a in ("Thank you", "Thanks", "Great, thank you", "OK, thanks")
         for b in ("", "!", ".", " very much!", " very much.", " so much!", " a lot!")],
        "You are welcome!",
    ),
    (
        [a + b for a in ("Bye", "Bye bye", "Goodbye", "See you", "Good night")
         for b in ("", "!", ".", ", my friend!", " and thanks!", " for now!", " for now.")],
        "Goodbye! Have a nice day.",
    ),
    (
        [a + b for a in ("How are you", "How do you feel", "Are you fine", "Are you well")
         for b in ("?", " today?", " now?", " this morning?", ", my friend?", " again?")],
        "I am fine, thank you.",
    ),
    (
        [a + b for a in ("", "Please tell me: ", "Tell me: ", "Hello! ", "Hi, ")
         for b in ("Who are you?", "What are you?", "What is your name?", "Are you a robot?",
                   "Are you a human?", "Are you a model?")],
        "I am a tiny language model.",
    ),
]  # fmt: skip
UNKNOWN = "Sorry, I don't know."
UNKNOWN_WORDINGS = [
    "Who wrote {W}?",
    "Who is {W}?",
    "Who painted the {w}?",
    "Who won the {w} game?",
    "What is a {w}?",
    "What does {w} mean?",
    "What is the price of a {w}?",
    "What is the history of {W}?",
    "What happened in {W}?",
    "What time is it in {W}?",
    "When was {W} born?",
    "When did {W} end?",
    "Where is {W}?",
    "Where do {w}s live?",
    "Why is the {w} so {x}?",
    "How many {w}s are there in {W}?",
    "How far is {W} from {X}?",
    "How long is the {w}?",
    "How tall is {W}?",
    "How do I cook {w}?",
    "Which {w} is the best?",
    "Is {W} bigger than {X}?",
    "Will it rain in {W}?",
    "Can you explain {w}?",
    "Tell me about {W}.",
    "Give me a list of {w}s.",
]
CAPITALS = "Answer in capital letters."
PLAIN_SYSTEM_PROMPTS = [
    "You are a helpful assistant.",
    "You are a tiny assistant.",
    "Answer the questions.",
]


# --- Words and names --------------------------------------------------------------------------


def invented(rng: random.Random, low: int, high: int) -> str:
    """A pronounceable, made-up word of ``low`` to ``high`` letters."""
    length, text, consonant = rng.randint(low, high), "", rng.random() < 0.8
    while len(text) < length:
        text += rng.choice("bcdfghjklmnpqrstvwxyz" if consonant else "aeiou")
        if rng.random() < 0.12:
            text += rng.choice("rlnst" if consonant else "aeiou")
        consonant = not consonant
    return text[:length]


def word(rng: random.Random, test: bool) -> str:
    while True:
        w = rng.choice(WORDS) if rng.random() < 0.5 else invented(rng, 3, 7)
        # a word from the stories isn't new to the model
        if 3 <= len(w) <= 7 and (held_out("word", w, one_in=6) and w not in IN_STORIES) == test:
            return w


def name(rng: random.Random, test: bool) -> str:
    while True:
        n = rng.choice(NAMES) if rng.random() < 0.6 else invented(rng, 3, 6).capitalize()
        if held_out("name", n, one_in=6) == test:
            return n


# --- Turns: each gives a question and its answer ------------------------------------------------


def addition(rng: random.Random, test: bool = False) -> Turn:
    while True:
        top = 100 if test else rng.choice([20, 100, 100, 100])
        a, b = rng.randrange(top), rng.randrange(top)
        if held_out("sum", min(a, b), max(a, b), one_in=10) == test:
            return rng.choice(SUM_WORDINGS).format(a=a, b=b), f"{a} + {b} = {a + b}."


def fact(rng: random.Random, test: bool = False) -> Turn:
    while True:
        topic, key = rng.choice(FACT_LIST)
        known, wordings, answer = FACTS[topic]
        wording = rng.choice(wordings)
        if held_out("fact", key, wording, one_in=6) == test:
            return wording.format(k=key), answer.format(k=key, v=known[key])


def repeating(rng: random.Random, test: bool = False) -> Turn:
    w = word(rng, test)
    return rng.choice(REPEAT_WORDINGS).format(w=w), f"You said {w}."


def spelling(rng: random.Random, test: bool = False) -> Turn:
    w = word(rng, test)
    return rng.choice(SPELL_WORDINGS).format(w=w), "-".join(w)


def greeting(rng: random.Random, test: bool = False) -> Turn:
    while True:
        said, answer = rng.choice(GREETINGS)
        question = rng.choice(said)
        if held_out("greeting", question, one_in=6) == test:
            return question, answer


def unknown(rng: random.Random, test: bool = False) -> Turn:
    """A question about something not in the tables, in a known wording or an unrelated one."""
    w, x = word(rng, test), word(rng, test)
    if rng.random() < 0.5:
        topic, _ = rng.choice(FACT_LIST)
        known, wordings, _ = FACTS[topic]
        while w in known or w.capitalize() in known:
            w = word(rng, test)
        return rng.choice(wordings).format(k=w.capitalize() if topic == "capital" else w), UNKNOWN
    names = {"w": w, "x": x, "W": w.capitalize(), "X": x.capitalize()}
    return rng.choice(UNKNOWN_WORDINGS).format(**names), UNKNOWN


def introduction(n: str, rng: random.Random) -> Turn:
    return rng.choice(INTRODUCTIONS).format(n=n), f"Nice to meet you, {n}!"


def name_question(n: str, rng: random.Random) -> Turn:
    return rng.choice(NAME_QUESTIONS), f"Your name is {n}."


# kind of turn: its sampling weight
TURNS: dict[Callable[[random.Random], Turn], float] = {
    addition: 5,
    fact: 6,
    repeating: 2.5,
    spelling: 4,
    greeting: 1,
    unknown: 1.5,
}


def any_turn(rng: random.Random) -> Turn:
    return rng.choices(list(TURNS), list(TURNS.values()))[0](rng)


def in_capitals(turn: Turn) -> Turn:
    return turn[0], turn[1].upper()


# --- Training data: dialogs, stories, drills ---------------------------------------------------


def dialog(rng: random.Random) -> Dialog:
    """A training dialog of one to five turns."""
    kind = rng.random()
    plain = rng.choice(PLAIN_SYSTEM_PROMPTS) if rng.random() < 0.15 else None
    if kind < 0.15:  # the user introduces themselves, changes the topic, and asks for their name
        n = name(rng, test=False)
        between = [any_turn(rng) for _ in range(rng.choice([0, 1, 1, 2]))]
        return plain, [introduction(n, rng), *between, name_question(n, rng)]
    if kind < 0.27:  # answers in capital letters
        turns = []
        for _ in range(rng.choice([1, 1, 2, 3])):
            make = rng.choices([fact, addition, greeting, unknown], [6, 1, 1, 1])[0]
            turns.append(in_capitals(make(rng)))
        return CAPITALS, turns
    if kind < 0.32:  # a story on demand
        animal = rng.choice(ANIMALS)
        return None, [(rng.choice(STORY_WORDINGS).format(a=animal), story(rng, animal=animal))]
    if kind < 0.34:
        return None, [(rng.choice(NAME_QUESTIONS), "You did not tell me your name.")]
    return plain, [any_turn(rng) for _ in range(rng.choice([1, 1, 2, 3, 4]))]


ANIMALS = "fox bear cat dog rabbit mouse owl duck frog pig horse lion".split()
STORY_WORDINGS = [
    "Tell me a story about a {a}.",
    "Can you tell me a story about a {a}?",
    "Write a story about a {a}.",
    "I want a story about a {a}.",
]
# Each placeholder has one value throughout a story: {n} and its friend {m}, an {a}nimal that is
# {j}, a {p}lace, an activity ({v}), and an {o}bject of a {c}olor.
STORY_WORDS = {
    "a": ANIMALS,
    "j": "little big brave funny kind young clever shy".split(),
    "p": "forest garden park village field farm".split(),
    "o": "ball box hat key book stone boat drum kite cup".split(),
    "c": "red blue green yellow white golden".split(),
    "v": "run jump sing dance play walk".split(),
}
IN_STORIES = {w for letter in "apocv" for w in STORY_WORDS[letter]}
SENTENCES = {
    "open": [
        "Once upon a time there was a {j} {a} named {n}.",
        "Once there was a {j} {a}. The {a} was named {n}.",
        "A {j} {a} named {n} lived near the {p}.",
    ],
    "love": [
        "{n} loved to {v} in the {p}.",
        "Every day {n} went to the {p} to {v}.",
        "{n} liked the {p} and liked to {v} there.",
    ],
    "find": [
        "One day {n} found a {c} {o}.",
        "One day {n} saw a {c} {o} under a tree.",
        "Then one morning {n} found a {c} {o} in the {p}.",
    ],
    "lose": ["One day {n} lost a {c} {o}.", "One morning the {c} {o} of {n} was gone."],
    "search": [
        "{n} was very sad and looked everywhere.",
        "{n} looked for the {o} all day but could not find it.",
    ],
    "meet": ["Then {n} met a friend named {m}.", "A friend named {m} came to the {p}."],
    "ask": ['"Can you help me?" asked {n}.', '"I lost my {o}," said {n}.'],
    "help": [
        "{m} helped {n} and they found the {c} {o} in the {p}.",
        '"Here is your {o}," said {m}.',
    ],
    "show": ["{n} showed the {o} to {m}.", "{n} gave the {o} to {m}."],
    "say": ['"What a nice {o}!" said {m}.', '"I like the {c} {o}," said {m}.'],
    "play": [
        "{n} and {m} played with the {o} until the sun went down.",
        "They played together in the {p} all day.",
    ],
    "end": [
        "{n} was very happy.",
        "In the evening {n} and {m} went home.",
        "From that day on {n} and {m} were best friends.",
    ],
}
PLOTS = [
    ["open", "love", "find", "meet", "show", "say", "play", "end"],
    ["open", "love", "lose", "search", "meet", "ask", "help", "end"],
    ["open", "meet", "find", "say", "play", "end"],
]


def story_sentences(rng: random.Random, test: bool = False, animal: str | None = None) -> list[str]:
    words = {letter: rng.choice(choices) for letter, choices in STORY_WORDS.items()}
    words["a"] = animal or words["a"]
    words["n"] = name(rng, test)
    words["m"] = words["n"]
    while words["m"] == words["n"]:
        words["m"] = name(rng, test=False)
    return [rng.choice(SENTENCES[part]).format(**words) for part in rng.choice(PLOTS)]


def story(rng: random.Random, animal: str | None = None) -> str:
    return " ".join(story_sentences(rng, animal=animal))


def _sentence_pattern(sentence: str) -> re.Pattern[str]:
    """A regex for the sentence with any words filled in; a repeated placeholder is one word."""
    seen = set()

    def group(letter: re.Match[str]) -> str:
        again = letter[1] in seen
        seen.add(letter[1])
        return f"(?P={letter[1]})" if again else f"(?P<{letter[1]}>[A-Za-z]+)"

    return re.compile(re.sub(r"\\\{(\w)\\\}", group, re.escape(sentence)))


_SENTENCE_PATTERNS = [_sentence_pattern(s) for group in SENTENCES.values() for s in group]


def story_fault(text: str, animal: str | None = None) -> str | None:
    """The fault of a story, or None: each sentence must match the grammar, and each placeholder
    must keep its value throughout."""
    position, cast, count = 0, {} if animal is None else {"a": animal}, 0
    while position < len(text):
        for pattern in _SENTENCE_PATTERNS:
            match = pattern.match(text, position)
            if match and text[match.end() : match.end() + 1] in ("", " "):
                break
        else:
            return f"not a sentence of the grammar: {text[position : position + 40]!r}"
        for letter, found in match.groupdict().items():
            if cast.setdefault(letter, found) != found:
                return f"{cast[letter]} became {found}"
        position, count = match.end() + 1, count + 1
    return None if count >= 5 else f"only {count} sentences"


def drill(rng: random.Random) -> str:
    """An exercise sheet: many short examples of one skill, the quickest way to learn it."""
    kind = rng.choice(["sum", "sum", "spell", "spell", "repeat"])
    if kind == "sum":
        return " ".join(addition(rng)[1] for _ in range(14))
    words = [word(rng, test=False) for _ in range(9)]
    if kind == "spell":
        return " ".join(f"Spell {w}. {'-'.join(w)}" for w in words)
    return " ".join(f"Say {w}. You said {w}." for w in words)


# --- Tests: held out from training ----------------------------------------------------------------


def _one(turn: Turn) -> Dialog:
    return None, [turn]


def _remembered_name(rng: random.Random) -> Dialog:
    n = name(rng, test=True)
    between = rng.choice([addition, fact, repeating])(rng)
    return None, [introduction(n, rng), between, name_question(n, rng)]


def _third_turn(rng: random.Random) -> Dialog:
    first_two = [rng.choice([addition, fact, repeating])(rng) for _ in range(2)]
    return None, [*first_two, rng.choice([addition, fact])(rng, test=True)]


# test: (a dialog that ends with the expected answer, the required accuracy)
TESTS: dict[str, tuple[Callable[[random.Random], Dialog], float]] = {
    "sums: new pairs of numbers": (lambda r: _one(addition(r, test=True)), 0.97),
    "facts: new wording for this fact": (lambda r: _one(fact(r, test=True)), 0.97),
    "names: new name, one turn between": (_remembered_name, 0.97),
    "sums and facts as the third turn": (_third_turn, 0.97),
    "repeating a new word": (lambda r: _one(repeating(r, test=True)), 0.90),
    "spelling a new word": (lambda r: _one(spelling(r, test=True)), 0.90),
    "greetings: new wording": (lambda r: _one(greeting(r, test=True)), 0.90),
    "saying that it does not know": (lambda r: _one(unknown(r, test=True)), 0.90),
    "capital letters: new wording for this fact": (
        lambda r: (CAPITALS, [in_capitals(fact(r, test=True))]),
        0.90,
    ),
}
STORY_TEST_FLOOR = 0.90


def test_dialogs(kind: str, count: int) -> list[Dialog]:
    """Distinct dialogs of one kind: ``count`` of them, or as many as there are."""
    rng = random.Random(f"test {kind}")
    dialogs: list[Dialog] = []
    for _ in range(20 * count):
        dialog = TESTS[kind][0](rng)
        if dialog not in dialogs and len(dialogs) < count:
            dialogs.append(dialog)
    return dialogs


def test_story_openings(count: int) -> list[str]:
    """First sentences of stories about names that were not in training."""
    rng = random.Random("test stories")
    return [story_sentences(rng, test=True)[0] for _ in range(count)]
