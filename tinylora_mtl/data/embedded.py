"""The embedded tasks: eight after BIG-Bench Hard (arXiv 2210.09261), and five languages, all generated from a seed.

A task is two functions. The first draws an abstract *problem*; the second puts it into words, as a prompt and its
answer. They are apart because the embedded model has met the same problems during pre-training in other, symbolic
notations (`pretrain.py`): the skill is in the model, the wording is what an adapter has to teach.

    >>> import random
    >>> problem = word_sorting(random.Random(0), 3)
    >>> problem
    (['hat', 'ink', 'bag'], 'bag hat ink')
    >>> in_words("word_sorting", problem)
    ('Sort the following words alphabetically: hat ink bag. Answer:', 'bag hat ink')
"""

NAMES = "Ann Ben Cal Dan Eve Fay Gus Ian Joe Kim Lea Max".split()
NUMBERS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
           "seventeen eighteen nineteen twenty").split()
CATEGORIES = {
    "animals": "cats dogs pigs cows goats ducks geese mice".split(),
    "fruits": "pears plums figs limes grapes melons kiwis dates".split(),
    "tools": "saws drills files axes spades rakes clamps nails".split()}
WORDS = ("ant axe bag bell bird boat book bowl cake card coat coin cup desk door drum egg fan fish flag fork gate "
         "glove gown hat hen ink jar key kite lamp leaf map mug nest oar pan pear pen ring rope sock tent vase").split()
BRACKETS = {"(": ")", "[": "]", "{": "}", "<": ">"}
MOVES = {"forward": (0, 1), "backward": (0, -1), "right": (1, 0), "left": (-1, 0)}  # you always face forward
MOVES_BACK = {(-x * steps, -y * steps): (way, steps) for way, (x, y) in MOVES.items() for steps in range(1, 6)}


def boolean_expressions(rng, size):
    """An expression of `size` truth values: (['not', '(', 'True', 'and', 'False', ')'], True)."""
    if size == 1:
        value = rng.random() < 0.5
        return ([str(value)], value) if rng.random() < 0.6 else (["not", str(value)], not value)
    split = rng.randint(1, size - 1)
    (left, a), (right, b) = boolean_expressions(rng, split), boolean_expressions(rng, size - split)
    operator = rng.choice(["and", "or"])
    tokens, value = ["(", *left, operator, *right, ")"], (a and b if operator == "and" else a or b)
    return (["not", *tokens], not value) if rng.random() < 0.15 else (tokens, value)


def multistep_arithmetic(rng, size):
    """An expression of `size` numbers, no result below 0 or above 99: (['(', '3', '+', '4', ')', '*', '2'], 14)."""
    if size == 1:
        value = rng.randint(1, 9)
        return [str(value)], value
    while True:
        split = rng.randint(1, size - 1)
        (left, a), (right, b) = multistep_arithmetic(rng, split), multistep_arithmetic(rng, size - split)
        operator = rng.choice("++--*")
        value = a + b if operator == "+" else a - b if operator == "-" else a * b
        if 0 <= value <= 99:
            left, right = (["(", *part, ")"] if len(part) > 1 else part for part in (left, right))
            return [*left, operator, *right], value


def word_sorting(rng, size):
    """`size` words, and the same in alphabetical order: (['pear', 'hen', 'gown'], 'gown hen pear')."""
    words = rng.sample(WORDS, size)
    return words, " ".join(sorted(words))


def dyck_languages(rng, size):
    """`size` brackets of which one to four are still open, and what closes them: (['(', '[', '<', '>'], '] )')."""
    while True:
        sequence, still_open = [], []
        for _ in range(size):
            if still_open and rng.random() < 0.45:
                sequence.append(BRACKETS[still_open.pop()])
            else:
                still_open.append(rng.choice(list(BRACKETS)))
                sequence.append(still_open[-1])
        if 1 <= len(still_open) <= 4:
            return sequence, " ".join(BRACKETS[bracket] for bracket in reversed(still_open))


def object_counting(rng, size):
    """`size` kinds of things with their numbers, a category, and how many are in it:
    ([(2, 'cats'), (3, 'saws'), (4, 'dogs')], 'animals', 6)."""
    category = rng.choice(list(CATEGORIES))
    inside = rng.sample(CATEGORIES[category], rng.randint(1, min(size, 3)))
    others = [thing for name, things in CATEGORIES.items() if name != category for thing in things]
    things = inside + rng.sample(others, size - len(inside))
    rng.shuffle(things)
    groups = [(rng.randint(2, 5), thing) for thing in things]
    return groups, category, sum(number for number, thing in groups if thing in inside)


def navigate(rng, size):
    """`size` moves, and whether they end where they began: ([('left', 2), ('forward', 1), ('right', 2)], False)."""
    def draw(count):
        return [(rng.choice(list(MOVES)), rng.randint(1, 5)) for _ in range(count)]

    moves = draw(size)
    if size > 1 and rng.random() < 0.5:  # half of the walks come home, by their last move
        while net_displacement(moves[:-1]) not in MOVES_BACK:
            moves = draw(size)
        moves[-1] = MOVES_BACK[net_displacement(moves[:-1])]
    return moves, net_displacement(moves) == (0, 0)


def net_displacement(moves):
    """Where a list of moves ends, seen from its start: (steps to the right, steps forward)."""
    return tuple(sum(MOVES[direction][axis] * steps for direction, steps in moves) for axis in (0, 1))


def web_of_lies(rng, size):
    """The first of `size` people is honest or not; each later one speaks of the one before. Is the last one honest?
    ([('Ann', False), ('Ben', False)], True): Ann lies. Ben says Ann lies. Ben tells the truth."""
    people = [(name, rng.random() < 0.5) for name in rng.sample(NAMES, size)]
    honest = people[0][1]
    for _, says_honest in people[1:]:
        honest = honest == says_honest
    return people, honest


def tracking_shuffled_objects(rng, size):
    """Alice, Bob and Claire hold a thing each and swap `size` times. What does one of them hold in the end?
    ([('Alice', 'cup'), ('Bob', 'hat'), ('Claire', 'map')], [('Alice', 'Bob')], 'Alice', 'hat')."""
    start = list(zip(("Alice", "Bob", "Claire"), rng.sample(WORDS, 3)))
    swaps = [tuple(rng.sample([name for name, _ in start], 2)) for _ in range(size)]
    asked = rng.choice(start)[0]
    return start, swaps, asked, holdings(start, swaps)[asked]


def holdings(start, swaps):
    """Who holds what after the swaps, as {name: thing}."""
    held = dict(start)
    for first, second in swaps:
        held[first], held[second] = held[second], held[first]
    return held


SKILLS = {problem.__name__: problem for problem in (
    boolean_expressions, word_sorting, dyck_languages, object_counting, navigate, web_of_lies,
    tracking_shuffled_objects, multistep_arithmetic)}
WORDED_SIZES = {
    "boolean_expressions": (4,), "word_sorting": (3, 4, 5), "dyck_languages": (5, 6, 7, 8), "object_counting": (2, 3),
    "navigate": (4,), "web_of_lies": (3, 4), "tracking_shuffled_objects": (1,), "multistep_arithmetic": (3,)}
ANSWERS = {"boolean_expressions": ("True", "False"), "navigate": ("Yes", "No"), "web_of_lies": ("Yes", "No")}


def in_words(name, problem):
    """The problem of task `name` as (prompt, answer). Every prompt ends in a cue, so that where it ends is known."""
    match name, problem:
        case "boolean_expressions", (tokens, value):
            prompt, answer = f"Evaluate the truth of this statement: {' '.join(tokens)}.", str(value)
        case "word_sorting", (words, answer):
            prompt = f"Sort the following words alphabetically: {' '.join(words)}."
        case "dyck_languages", (sequence, answer):
            prompt = f"Complete the rest so that all brackets close properly: {' '.join(sequence)}"
        case "object_counting", (groups, category, total):
            listed = ", ".join(f"{NUMBERS[number]} {thing}" for number, thing in groups)
            prompt, answer = f"I have {listed}. How many {category} do I have?", str(total)
        case "navigate", (moves, home):
            walk = " ".join(f"Take {NUMBERS[steps]} step{'s' * (steps > 1)} {way}." for way, steps in moves)
            prompt, answer = f"{walk} Do you return to the starting point?", "Yes" if home else "No"
        case "web_of_lies", (people, honest):
            words = ["tells the truth" if says_honest else "lies" for _, says_honest in people]
            said = "".join(f" {people[i][0]} says {people[i - 1][0]} {words[i]}." for i in range(1, len(people)))
            prompt = f"{people[0][0]} {words[0]}.{said} Does {people[-1][0]} tell the truth?"
            answer = "Yes" if honest else "No"
        case "tracking_shuffled_objects", (start, swaps, asked, answer):
            first = ", ".join(f"{name} has the {thing}" for name, thing in start)
            then = " ".join(f"{a} and {b} trade." for a, b in swaps)
            prompt = f"At first {first}. {then} At the end, what does {asked} have?"
        case "multistep_arithmetic", (tokens, value):
            signs = {"+": "plus", "-": "minus", "*": "times"}
            spoken = " ".join(NUMBERS[int(token)] if token.isdigit() else signs.get(token, token) for token in tokens)
            prompt, answer = f"Compute the result of {spoken}.", str(value)
    return f"{prompt} Answer:", answer


LANGUAGES = {
    "english": NUMBERS,
    "german": ("null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn "
               "sechzehn siebzehn achtzehn neunzehn zwanzig").split(),
    "french": ("zéro un deux trois quatre cinq six sept huit neuf dix onze douze treize quatorze quinze seize dix-sept "
               "dix-huit dix-neuf vingt").split(),
    "spanish": ("cero uno dos tres cuatro cinco seis siete ocho nueve diez once doce trece catorce quince dieciséis "
                "diecisiete dieciocho diecinueve veinte").split(),
    "italian": ("zero uno due tre quattro cinque sei sette otto nove dieci undici dodici tredici quattordici quindici "
                "sedici diciassette diciotto diciannove venti").split()}
PHRASES = {  # a result, plus, minus; the largest of three
    "english": ("How much is {}? Answer:", "plus", "minus", "Which is the largest, {}, {} or {}? Answer:"),
    "german": ("Wie viel ist {}? Antwort:", "plus", "minus", "Was ist am größten, {}, {} oder {}? Antwort:"),
    "french": ("Combien font {} ? Réponse :", "plus", "moins", "Quel est le plus grand, {}, {} ou {} ? Réponse :"),
    "spanish": ("¿Cuánto es {}? Respuesta:", "más", "menos", "¿Cuál es el mayor, {}, {} o {}? Respuesta:"),
    "italian": ("Quanto fa {}? Risposta:", "più", "meno", "Qual è il maggiore, {}, {} o {}? Risposta:")}
NUMBER_KINDS = ("++", "--", "+-", "max")


def number_problem(rng, kind):
    """Three numbers and a result, all from 0 to 20: ((3, 4, 2), 5) of the kind "+-", which asks for 3 + 4 - 2."""
    while True:
        a, b, c = operands = tuple(rng.randint(0, 20) for _ in range(3))
        steps = {"++": (a + b, a + b + c), "--": (a - b, a - b - c), "+-": (a + b, a + b - c), "max": (max(operands),)}
        if all(0 <= step <= 20 for step in steps[kind]) and (kind != "max" or len(set(operands)) == 3):
            return operands, steps[kind][-1]


def expression(operands, signs):
    """"3 + 4 - 2", from what is written for the three numbers and for the two signs."""
    return f"{operands[0]} {signs[0]} {operands[1]} {signs[1]} {operands[2]}"


def sizes_of(name):
    """What the problems of an embedded task differ in, beside chance: the sizes of a skill, the kinds of a language."""
    return WORDED_SIZES.get(name, NUMBER_KINDS)


def worded_sample(name, rng, size=None):
    """One (prompt, answer) of an embedded task, by name: one of SKILLS or of LANGUAGES; size: one of `sizes_of`."""
    size = size or rng.choice(sizes_of(name))
    if name in SKILLS:
        return in_words(name, SKILLS[name](rng, size))
    operands, answer = number_problem(rng, size)
    words = LANGUAGES[name]
    written = [words[number] for number in operands]
    result, plus, minus, largest = PHRASES[name]
    if size == "max":
        return largest.format(*written), words[answer]
    return result.format(expression(written, [{"+": plus, "-": minus}[sign] for sign in size])), words[answer]
