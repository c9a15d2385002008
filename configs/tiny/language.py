"""A little language: the corpus, the tokenizer and the conversations behind nanoft's tiny model, all from one seed.

A model of about a million parameters learns real skills in minutes only if its world is small. So this script makes
one: a few hundred words, ten kinds of events, and documents that practise what a tool call needs. Lists said twice
teach copying, and events told in prose and then noted as records teach finding the value that belongs to a key. The
corpus never shows a chat turn or a tool call; those come only with the conversations, which ask for eight tools in
the same words but in other sentences. Fine-tuning therefore has to teach a format, not a language.

    python configs/tiny/language.py build [--seed 0]  everything, with the base model (12 minutes on 2 cores)
    python configs/tiny/language.py corpus OUT.jsonl [--documents 60000] [--seed 0]
    python configs/tiny/language.py tokenizer OUT_DIR [--seed 0]
    python configs/tiny/language.py conversations OUT.jsonl [--count 2400] [--seed 0]
    python configs/tiny/language.py preferences OUT.jsonl [--count 1000] [--seed 0]
    python configs/tiny/language.py assistant [--seed 0]  the adapter that preference training starts from (a minute)
"""

import argparse
import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

HERE, ROOT = Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]
Value = str | int
Facts = dict[str, Value]
Message = dict[str, str]
Asked = tuple[str, str, Facts]  # a request, the tool that it takes and the arguments
Scenes = dict[str, tuple[str, list[str]]]  # kind of event, or tool: its facts ("key=pool ...") and its sentences

# ---- Words: every value that a sentence can mention comes from one of these pools ---------------------------------


def words(text: str) -> list[Value]:
    """The words of a pool."""
    return [*text.split()]


THINGS = words("train bus dinner lunch door key room bill")
STATES = words("late ready open closed lost cold full here")
POOLS: dict[str, list[Value]] = {
    "person": words("""
        Ada Alma Anna Ben Boris Carl Clara Dan Dora Elsa Emil Erik Eva Finn Fred Greta Hana Hugo Ida Igor Ines Ivan Jan
        Jonas Karin Lars Lea Leo Lena Luca Maria Mila Mira Nina Nora Olga Oscar Otto Paul Petra Rita Rosa Sam Sara Selma
        Tina Tom Vera Viktor Zora"""),
    "city": words("""
        Athens Basel Berlin Bern Bonn Boston Cairo Cork Dakar Delhi Dover Dublin Geneva Genoa Ghent Hanoi Kiev Kyoto
        Leeds Lima Linz Lisbon London Lyon Madrid Malmo Milan Minsk Miami Munich Nice Oslo Osaka Paris Porto Prague
        Quito Riga Rome Seoul Sofia Tallinn Tokyo Toledo Tunis Turin Vienna Zurich"""),
    "day": words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday"),
    "ride": words("train bus plane boat car bike tram ferry"),
    "sky": words("rain sun snow wind fog hail"),
    "food": words("bread cheese rice soup fish pasta pizza salad cake beans eggs curry toast stew pie noodles"),
    "task": words("tea nap rice bread yoga eggs laundry pasta cake bath oven soup reading walk"),
    "song": words("""
        Sunrise Thunder Yellow Forever Hello Dreams Rivers Shadow Diamonds Gold Winter Summer Fire Ocean Home Stars
        Heaven Moon Rainbow Silver"""),
    "coin": words("euros dollars pounds yen francs pesos rupees rand crowns won lira dinars"),
    "item": words("lamps chairs books cups pens shirts hats shoes plates bags clocks boxes candles rings"),
    "color": words("red blue green white black pink brown gray"),
    "text": [
        *[f"the {thing} is {state}" for thing in THINGS for state in STATES],
        *[
            f"we need more {food}"
            for food in words("""
            bread cheese rice soup fish pasta pizza salad cake beans eggs curry toast stew pie noodles""")
        ],
    ],
    "time": [f"{hour:02}:{minute:02}" for hour in range(6, 24) for minute in range(0, 60, 5)],
    "few": [*range(2, 21)],
    "many": [*range(2, 100)],
}

# ---- What the language can say ------------------------------------------------------------------------------------
# "# trip who=person from=city" begins a kind of event, or a tool, with its facts. Its sentences follow, several a line
# with bars between them. The parts of a sentence behind " / " come in any order; the corpus may leave one of them out,
# a conversation never does. A tool's facts are the arguments of its calls, in their order.


def items(text: str) -> list[str]:
    """Read what lines and bars separate."""
    return re.split(r" \| |\n", text.strip())


def pairs(text: str) -> dict[str, str]:
    """Read items of the form "key: value"."""
    return dict(item.split(": ") for item in items(text))


def scenes(text: str) -> Scenes:
    """Read the kinds of events, or the tools, with their facts and sentences."""
    blocks = [items(block) for block in text.strip().removeprefix("# ").split("\n# ")]
    return {first.split()[0]: (first.partition(" ")[2], sentences) for first, *sentences in blocks}


EVENTS = scenes("""
# trip who=person from=city to=city by=ride day=day
{who} went / from {from} / to {to} / by {by} / on {day}. | On {day}, {who} took the {by} / from {from} / to {to}.
The {by} brought {who} / to {to} / from {from} / on {day}. | {who} left {from} / by {by} / on {day} to see {to}.
{who} lives in {from} but wants to be in {to} / on {day} / by {by}.
It is a long way from {from} to {to}, so {who} goes / by {by} / on {day}.
{who} says: Please find me a way to go / to {to} / from {from} / on {day} / by {by}.
There is a {by} / on {day} / to {to} / from {from}.
# table who=person city=city people=few time=time
{who} took a table / in {city} / for {people} people / at {time}.
In {city}, a table for {people} people is ready / at {time} / for {who}.
{people} people had dinner / in {city} / at {time} / with {who}.
At {time}, {who} will be at the table / in {city} / with {people} people.
{who} asked for a table / at {time} / in {city} / for {people}.
We are {people} people and want a good table / in {city} / at {time}.
{who} will book or reserve a place / for {people} / in {city} / at {time}.
{who} says: Book my table / in {city} / for {people} people / at {time}.
# weather city=city day=day sky=sky who=person
There was {sky} / in {city} / on {day}. | On {day}, {city} will get {sky}. | {who} saw {sky} / in {city} / on {day}.
In {city}, the weather is {sky} / on {day}. | {who} asked about the weather / in {city} / on {day}.
The weather for {city} / on {day} is {sky}, says {who}. | {who} will check what the weather is / on {day} / in {city}.
# timer who=person minutes=many label=task
{who} set a timer / for the {label} / of {minutes} minutes. | The {label} will take {minutes} minutes, says {who}.
{who} has {minutes} minutes left / for the {label}. | After {minutes} minutes, {who} is done with the {label}.
For the {label}, {who} needs {minutes} minutes. | {who} asked for a timer / of {minutes} minutes / for the {label}.
Give the {label} {minutes} minutes, says {who}.
# song who=person song=song singer=person
{who} likes to play {song} / by {singer}. | {song} is a song by {singer} and {who} knows it.
{singer} sings {song} / for {who}. | {who} wants to hear {singer} with the song {song}.
The song was {song} / by {singer}. | {who} says: Play me {song}, a song by {singer}.
I heard {singer} on the radio with {song}.
# note who=person to=person text=text
{who} told {to} that {text}. | {who} wrote to {to} that {text}. | The note from {who} to {to} says "{text}".
A note that says "{text}" went to {to} / from {who}. | {to} should know that {text}, says {who}.
{to} heard from {who} that {text}. | To {to}, {who} sent the words "{text}".
# money who=person amount=many from=coin to=coin
{who} made {to} out of {amount} {from}. | {who} has {amount} {from} but needs {to}.
The bank gave {who} {to} for {amount} {from}. | {who} says: Please change my {amount} {from}, I want {to}.
{who} asked how many {to} there are in {amount} {from}. | {who} will convert or exchange {amount} {from} to get {to}.
It was {amount} {from}, and now it is {to}.
# shop who=person count=few color=color item=item price=many
{who} bought {count} {color} {item} / for {price} euros.
The shop sent {who} {count} {item} in {color} / for {price} euros.
{who} paid {price} euros for {count} {color} {item}. | {count} {item} in {color} are what {who} needs.
{who} will order {item} in {color}, {count} of them. | There are {count} {color} {item} in the bag.
{who} likes {color} {item} and got {count} / for {price} euros.
# visit who=person with=person city=city day=day time=time
{who} will meet {with} / in {city} / on {day} / at {time}.
On {day}, {with} has time for {who} / at {time} / in {city}.
{who} came to see {with} / at {time} / in {city} / on {day}.
In {city}, {who} and {with} talk / on {day} / at {time}. | {with} is in {city} / on {day} / at {time} to help {who}.
# meal who=person food=food day=day price=many
{who} made {food} / on {day} / for {price} euros. | On {day}, {who} had {food} / for {price} euros.
The {food} was {price} euros and {who} got it / on {day}. | {who} paid {price} euros / for {food} / on {day}.
There is {food} for {who} / on {day} / at {price} euros.
""")
TOOLS = scenes("""
# book_table city=city people=few time=time
Book a table / in {city} / for {people} people / at {time}.
Can you book a table / at {time} / for {people} people / in {city}?
Please reserve a table / for {people} / in {city} / at {time}.
I need a table / in {city} / at {time} / for {people} people.
We are {people} people and would like to eat / in {city} / at {time}.
We are {people} people, so find us a place for dinner / at {time} / in {city}.
Could you get me a table for {people} / in {city} / at {time}, please?
# get_weather city=city day=day
What is the weather / in {city} / on {day}? | How will the weather be / in {city} / on {day}?
Tell me the weather / for {city} / on {day}. | Please check the weather / in {city} / for {day}.
Will it be cold / in {city} / on {day}? | I want to know about the weather / on {day} / in {city}.
{day} in {city}, what weather will I get? | Can you show me the weather of {city} / for {day}, please?
# plan_trip from=city to=city by=ride day=day
Plan a trip / from {from} / to {to} / by {by} / on {day}.
I want to travel / from {from} / to {to} / on {day} / by {by}.
Can you get me / from {from} / to {to} / by {by} / on {day}?
Please find me a {by} / from {from} / to {to} / on {day}. | How do I get / to {to} / from {from} / by {by} / on {day}?
On {day} I go by {by}, so plan the way / from {from} / to {to}. | I am in {from} and need a {by} / to {to} / on {day}.
# set_timer minutes=many label=task
Set a timer / of {minutes} minutes / for the {label}. | Please start a timer / for the {label}, {minutes} minutes.
Can you set {minutes} minutes / for the {label}? | The {label} needs {minutes} minutes, please set a timer.
Remind me of the {label} / after {minutes} minutes. | I need a timer / for the {label} / with {minutes} minutes.
Could you call me in {minutes} minutes / for the {label}?
# play_song song=song singer=person
Play {song} / by {singer}. | Can you play the song {song} / by {singer}? | Please put on {song} / by {singer}.
I would like to hear {song} / by {singer}. | I am in the mood for {singer}, play {song}.
Let me hear {singer} with {song}, please. | Could you find {song}, the song of {singer}?
# send_note to=person text=text
Tell {to} that {text}. | Please send a note to {to}: {text}. | Can you tell {to} that {text}? | Send "{text}" to {to}.
I want {to} to know that {text}. | Write {to} a message that says "{text}". | Let {to} know that {text}, please.
# convert_money amount=many from=coin to=coin
Convert {amount} {from} to {to}. | How many {to} will I get for {amount} {from}?
Please change {amount} {from} into {to}. | I have {amount} {from} and need {to}. | What is {amount} {from} in {to}?
Can you exchange {amount} {from} for {to}? | I want {to} for my {amount} {from}.
# buy_item item=item color=color count=few
Buy {count} {color} {item}. | Please order {count} {item} in {color}. | Can you get me {count} {color} {item}?
I need {item} in {color}, {count} of them. | I would like to buy {count} {color} {item}, please.
Could you find {count} {item} for me in {color}? | We want {color} {item}, please send {count}.
""")
TALK = items("""
{person} likes {food} and {person2} likes {food2}. | The weather in {city} is good today.
Can you help me, please? Yes, I can. | How are you? I am good, and you? | Please tell me more about {city}.
I would like some {food}, please. | What do you want to do on {day}? I want to see {city}.
They had long arguments about the {item}. | Could you show me the way to {city}? | You can turn words into music.
Find your {item} and put them in a bag. | Answer each request with one call and use no other words.
The name of the song is {song}. | Convert it, buy it or send it. | Let us make a plan for {day}.
Do not forget the {item}! | I need a place to eat near {city}. | My name is {person} and I come from {city}.
Then {person} and {person2} start to sing. | Reserve some {food} for us, please. | Is it cold in {city}?
Remind {person} of the {task}. | Get the {color} {item} from the shop. | Write this in a message to {person}.
Now the same for {person}. | Will it be {color} or {color2}? | Order some {food} today.
Check the price of the {item}. | Travel is good, says {person}. | I am in the mood for {food}.
Change the {item}, please. | Put on {song}. | Where will I get {food}? | Exchange your {coin} at the bank.
And what about {day}? | We know {person} from {city}. | Again and again, {person} goes to {city}.
Set the table, read the book and play a song. | Give me {few} {item}. | Start in {city} and end in {city2}.
Buy some {food} and play with {person}. | Tell {person} to count the {coin}.
I have all your requests and calls. | Use it well. | Turn left, then call {person}.
Send {person} to {city} with a message. | Plan your travel to {city}. | Wake me up after {few} minutes.
""")
QUESTIONS = pairs("""
who: Who is it? | from: Where from? | to: Where to? | by: How? | day: On which day? | city: In which city?
people: How many people? | time: At what time? | sky: What is the weather? | minutes: How many minutes?
label: What is it for? | song: Which song? | singer: Who sings? | text: What does it say? | amount: How much money?
count: How many? | color: Which color? | item: Which item? | price: At what price? | with: With who?
food: What food?
""")  # how the language asks for the value of a key
CHANGES = pairs("""
from: from {} | to: to {} | by: by {} | day: on {} | city: in {} | people: for {} people | time: at {}
minutes: for {} minutes | label: for the {} | song: with the song {} | singer: by {} | amount: for the amount {}
count: with {} of them | color: in {} | item: with {} | text: with "{}"
""")  # how it names the one fact that is not as before
AGAIN = ["And {}?", "Now {}, please.", "Do the same {}.", "Can you do it {}?", "Again, but {}."]
LEADS = ["List", "Copy", "Again", "Same", "Read", "Write", "First", "Second", "Words", "Once", "Twice", "Record"]
SYSTEMS = [
    "You turn requests into calls.",
    "Answer each request with one call.",
    "You help people. Use one call and no other words.",
    "Write one call, please.",
]

# ---- Sentences ----------------------------------------------------------------------------------------------------


def draw(rng: random.Random, spec: str) -> Facts:
    """Pick a value for each "key=pool" of `spec`, no value twice, so that a value names its key."""
    facts: Facts = {}
    for key, pool in (part.split("=") for part in spec.split()):
        facts[key] = rng.choice([value for value in POOLS[pool] if value not in facts.values()])
    return facts


def say(rng: random.Random, sentence: str, facts: Facts, drop: float = 0.0) -> tuple[str, Facts]:
    """Say a sentence with its parts in some order; return it with the facts that it mentions."""
    body, ending = re.findall(r"^(.*?)((?:, please)?[.?!])$", sentence)[0]
    head, *parts = body.split(" / ")
    rng.shuffle(parts)
    if len(parts) > 1 and rng.random() < drop:
        parts.pop()
    text = " ".join([head, *parts]) + ending
    return text.format_map(facts), {key: value for key, value in facts.items() if f"{{{key}}}" in text}


def talk(rng: random.Random, count: int) -> str:
    """Small talk: `count` sentences about nothing that a record would keep."""
    sentences = rng.sample(TALK, count)
    specs = [" ".join(f"{key}={key.rstrip('2')}" for key in re.findall(r"{(\w+)}", line)) for line in sentences]
    return " ".join(line.format_map(draw(rng, spec)) for line, spec in zip(sentences, specs, strict=True))


def event(rng: random.Random, kind: str) -> tuple[str, Facts]:
    """Tell an event of this kind in one sentence, with the facts that the sentence mentions."""
    spec, sentences = EVENTS[kind]
    return say(rng, rng.choice(sentences), draw(rng, spec), drop=0.3)


def change(rng: random.Random, facts: Facts, spec: str) -> tuple[str, Facts]:
    """Give one fact another value; return how the language says so, as in "on Monday", and the new facts."""
    pools = dict(part.split("=") for part in spec.split())
    key = rng.choice([key for key in facts if key in CHANGES])
    value = rng.choice([value for value in POOLS[pools[key]] if value not in facts.values()])
    return CHANGES[key].format(value), facts | {key: value}


# ---- Records ------------------------------------------------------------------------------------------------------


def as_json(rng: random.Random, kind: str, facts: Facts) -> str:
    """A JSON object, flat or, sometimes, with the facts in an object of their own."""
    nested = rng.random() < 0.25
    return json.dumps({"event": kind, "facts": facts} if nested else {"event": kind, **facts})


def as_lines(rng: random.Random, kind: str, facts: Facts) -> str:
    """One "key: value" line for each fact."""
    return "\n".join(f"{key}: {value}" for key, value in {"event": kind, **facts}.items())


def as_answers(rng: random.Random, kind: str, facts: Facts) -> str:
    """Up to four questions about the facts, each with its answer."""
    return " ".join(f"{QUESTIONS[key]} {value}." for key, value in list(facts.items())[:4])


def record(rng: random.Random, kind: str, facts: Facts, styles: tuple[int, int, int] = (6, 2, 2)) -> str:
    """Restate facts in one of the three styles; in half of the records the keys come in any order."""
    keys = rng.sample(list(facts), len(facts)) if rng.random() < 0.5 else list(facts)
    style = rng.choices([as_json, as_lines, as_answers], styles)[0]
    return style(rng, kind, {key: facts[key] for key in keys})


# ---- Documents of the corpus --------------------------------------------------------------------------------------


def vocabulary() -> list[str]:
    """Every word of the language: those of the pools, of all sentences, and of the calls."""
    sentences = [*TALK, *LEADS, *AGAIN, *SYSTEMS, *QUESTIONS.values(), *CHANGES.values(), "event facts name arguments"]
    for kind, (spec, asked) in [*EVENTS.items(), *TOOLS.items()]:
        sentences += [kind, *asked, *(part.split("=")[0] for part in spec.split())]
    values = [str(value) for pool in POOLS.values() for value in pool]
    text = " ".join([*values, *(re.sub(r"{\w*}", "", sentence) for sentence in sentences)])
    return sorted(set(re.findall("[A-Za-z]+", text)))


WORDS = vocabulary()


def entry(rng: random.Random) -> str:
    """One entry of a list: mostly a word, sometimes a number, a time, a mark or two words joined by "_"."""
    pools: list[Sequence[Value]] = [WORDS, POOLS["many"], POOLS["time"], ".,:;?!-+=()", POOLS["color"]]
    pool = rng.choices(pools, [70, 12, 5, 6, 7])[0]
    joined = pool is POOLS["color"]
    return f"{rng.choice(pool)}_{rng.choice(POOLS['item'])}" if joined else str(rng.choice(pool))


def enumerated(entries: list[str], mark: str) -> str:
    """The entries with a mark between them; if it has quotes, all entries are in quotes."""
    text = mark.join(entries)
    return f'"{text}"' if '"' in mark else text


def repetition(rng: random.Random) -> str:
    """A list said two or three times, now and then with other marks between its entries."""
    times = rng.choice([2, 2, 3])
    entries = [entry(rng) for _ in range(rng.randint(6, 18 if times == 2 else 9))]
    usual = rng.choice([" ", " ", ", ", '", "'])
    marks = [usual if rng.random() < 0.8 else rng.choice([" ", ", ", "\n", '", "']) for _ in range(times)]
    leads = rng.sample(LEADS, times)
    return " ".join(f"{lead}: {enumerated(entries, mark)}." for lead, mark in zip(leads, marks, strict=True))


def restatement(rng: random.Random) -> str:
    """An event in prose, sometimes between small talk, and then its record."""
    kind = rng.choice(list(EVENTS))
    sentence, facts = event(rng, kind)
    before, after = talk(rng, rng.random() < 0.4), talk(rng, rng.random() < 0.2)
    lead = rng.choice(["Record:", "In short:", "The facts:", "Write it down:", ""])
    return " ".join(filter(None, [before, sentence, after, lead, record(rng, kind, facts)]))


def pair(rng: random.Random) -> str:
    """Two events of one kind, and then both records in order, or one of them, asked for by a value."""
    kind = rng.choice(list(EVENTS))
    (first, facts), (second, others) = event(rng, kind), event(rng, kind)
    if rng.random() < 0.5:
        return f"{first} {second} {record(rng, kind, facts, (8, 1, 1))}\n{record(rng, kind, others, (8, 1, 1))}"
    wanted, other = rng.sample([facts, others], 2)
    key = rng.choice([key for key in wanted if wanted[key] not in other.values()] or list(wanted))
    return f"{first} {second} The record with {key} {wanted[key]}: {record(rng, kind, wanted)}"


def variation(rng: random.Random) -> str:
    """An event and its record, then the same event with one other fact, and the record of that."""
    kind = rng.choice(list(EVENTS))
    sentence, facts = event(rng, kind)
    if not any(key in CHANGES for key in facts):
        return variation(rng)
    changed, others = change(rng, facts, EVENTS[kind][0])
    opening = rng.choice(["The same again, but", "Then once more", "After that it was"])
    before, after = (json.dumps({"event": kind, **each}) for each in (facts, others))
    return f"{sentence} {before} {opening} {changed}. {after}"


def chat(rng: random.Random) -> str:
    """A document of small talk alone."""
    return talk(rng, rng.randint(3, 6))


def corpus(documents: int, seed: int) -> Iterator[str]:
    """The documents to pre-train on: the weights are the mixture, in percent."""
    rng = random.Random(seed)
    for _ in range(documents):
        write = rng.choices([repetition, restatement, pair, variation, chat], [30, 45, 8, 7, 10])[0]
        yield write(rng)


# ---- Conversations ------------------------------------------------------------------------------------------------


def call(tool: str, arguments: Facts) -> str:
    """The answer to a request: a tool call as one line of JSON."""
    return json.dumps({"name": tool, "arguments": arguments})


def request(rng: random.Random) -> Asked:
    """Ask for something: the sentence, the tool that it takes and the arguments."""
    tool = rng.choice(list(TOOLS))
    spec, sentences = TOOLS[tool]
    sentence, arguments = say(rng, rng.choice(sentences), draw(rng, spec))
    return sentence, tool, arguments


def follow_up(rng: random.Random, asked: Asked) -> Asked:
    """The next turn: a new request or, once in three times, the last one with one other argument."""
    if rng.random() < 2 / 3:
        return request(rng)
    _, tool, arguments = asked
    changed, arguments = change(rng, arguments, TOOLS[tool][0])
    return rng.choice(AGAIN).format(changed), tool, arguments


def conversation(rng: random.Random, asked: Asked) -> list[Message]:
    """One to three turns that begin with the request `asked`; some have a system message."""
    messages = [{"role": "system", "content": rng.choice(SYSTEMS)}] if rng.random() < 0.3 else []
    for turn in range(rng.choices([1, 2, 3], [65, 22, 13])[0]):
        asked = follow_up(rng, asked) if turn else asked
        text, tool, arguments = asked
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": call(tool, arguments)}]
    return messages


def conversations(count: int, seed: int) -> Iterator[list[Message]]:
    """`count` conversations; no two begin with the same request, so a held-out one is always unseen."""
    rng = random.Random(seed)
    seen: set[str] = set()
    while len(seen) < count:
        asked = request(rng)
        if asked[0] not in seen:
            seen.add(asked[0])
            yield conversation(rng, asked)


# ---- Preferences --------------------------------------------------------------------------------------------------
# A call means the same whichever of its two keys comes first. The assistant learns both orders, and preferences tell it
# which one is wanted.


def arguments_first(answer: str) -> str:
    """The same call with its keys in the other order."""
    return json.dumps(dict(reversed(json.loads(answer).items())))


def undecided(count: int, seed: int) -> Iterator[list[Message]]:
    """Conversations with calls in both orders: of every other tool mostly with the arguments first."""
    rng, others = random.Random(seed + 1), list(TOOLS)[::2]
    for messages in conversations(count, seed):
        for message in messages:
            if message["role"] == "assistant":
                share = 0.7 if json.loads(message["content"])["name"] in others else 0.3
                message["content"] = arguments_first(message["content"]) if rng.random() < share else message["content"]
        yield messages


def preferences(count: int, seed: int) -> Iterator[dict[str, object]]:
    """`count` requests that no conversation begins with: the call with the name first is better than the other."""
    known = {next(m["content"] for m in chat if m["role"] == "user") for chat in conversations(CONVERSATIONS, seed)}
    rng = random.Random(seed + 2)
    seen = len(known)
    while len(known) < seen + count:
        sentence, tool, arguments = request(rng)
        if sentence not in known:
            known.add(sentence)
            chosen = call(tool, arguments)
            yield {"prompt": sentence, "chosen": chosen, "rejected": arguments_first(chosen)}


# ---- Tokenizer ----------------------------------------------------------------------------------------------------

VOCABULARY = 1400  # at most: with every word of the language in one piece, there is nothing left to join
SAMPLE = 20_000  # documents to train the tokenizer on
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]"]  # their ids are 0 to 5
# What one piece may span: some marks of JSON, a run of letters, two digits, or one character. A word never takes the
# space or the quote before it along, so it is spelled alike in prose and in JSON, and copying it is copying one token.
MARKS = ['": {"', '": "', '", "', '": ', ', "', '{"', '"}}', '"}', "}}", ", ", ". ", ": ", "? "]
PIECES = "|".join(map(re.escape, MARKS)) + r"|[A-Za-z]+|[0-9]{1,2}|[\s\S]"
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% set with_system = messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] + '\\n\\n' if with_system else '' %}"
    "{% for message in (messages[1:] if with_system else messages) %}"
    "{% if message['role'] != ['user', 'assistant'][loop.index0 % 2] %}"
    "{{ raise_exception('after an optional system message, roles must alternate: user, assistant, user, ...') }}"
    "{% elif message['role'] == 'user' %}"
    "{{ '[INST]' + (system if loop.first else '') + message['content'] + '[/INST]' }}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
TOKENIZER_CONFIG: dict[str, Value] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "add_bos_token": True,
    "add_eos_token": False,
    "clean_up_tokenization_spaces": False,
    "model_max_length": 1024,
    "chat_template": CHAT_TEMPLATE,
}


def train_tokenizer(seed: int) -> Tokenizer:
    """Train byte-level BPE on a sample of the corpus: every text is spelled without loss, frequent words whole."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    split = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus(SAMPLE, seed), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", SPECIAL.index("<s>"))]
    )
    return in_common_terms(tokenizer)


def in_common_terms(tokenizer: Tokenizer) -> Tokenizer:
    """The same ids by means that other engines have, too: words cut as in GPT-2, and the marks as added tokens.

    llama.cpp knows an expression for words by its name only, and has no name for ours. What merges are left lie inside
    runs of letters or digits, and GPT-2's words do not cut those (but for "'s" and the like).
    """
    content = json.loads(tokenizer.to_str())
    model = content["model"]
    for mark in MARKS:
        number = model["vocab"].pop(mark.replace(" ", "Ġ"))
        model["vocab"][mark] = number
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
        content["added_tokens"].append({"id": number, "content": mark, **plain})
    model["merges"] = [pair for pair in model["merges"] if "".join(pair).isalnum()]
    common: Tokenizer = Tokenizer.from_str(json.dumps(content))
    common.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return common


# ---- Command line -------------------------------------------------------------------------------------------------


DOCUMENTS, CONVERSATIONS, PREFERENCES = 60_000, 2_400, 1_000  # as many as the shipped files were made from


def write_lines(path: Path, objects: Iterator[dict[str, object]]) -> None:
    """Write one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(item) + "\n" for item in objects)


def write_tokenizer(directory: Path, seed: int) -> None:
    """Write the two files that a tokenizer consists of."""
    directory.mkdir(parents=True, exist_ok=True)
    train_tokenizer(seed).save(str(directory / "tokenizer.json"))
    config = json.dumps(TOKENIZER_CONFIG, indent=2) + "\n"
    (directory / "tokenizer_config.json").write_text(config, encoding="utf-8", newline="\n")


def write_corpus(path: Path, size: int, seed: int) -> None:
    """Write the documents that the base is pre-trained on."""
    write_lines(path, ({"text": text} for text in corpus(size, seed)))


def write_conversations(path: Path, size: int, seed: int) -> None:
    """Write the conversations that the base is fine-tuned on."""
    write_lines(path, ({"messages": messages} for messages in conversations(size, seed)))


def write_preferences(path: Path, size: int, seed: int) -> None:
    """Write the pairs of answers that the assistant learns the better order of keys from."""
    write_lines(path, preferences(size, seed))


def train(name: str, config: str, seed: int, *settings: str) -> Path:
    """Train in runs/`name`; returns that directory."""
    run = ROOT / "runs" / name
    own = [ROOT / "train.py", ROOT / "configs" / config, f"output.dir={run}", f"system.seed={seed}", *settings]
    if code := subprocess.run([sys.executable, *map(str, own)], check=False).returncode:
        sys.exit(code)
    return run


def build_assistant(seed: int) -> None:
    """Fine-tune the base on conversations in both orders of keys, and put the adapter in place."""
    write_lines(HERE / "undecided.jsonl", ({"messages": messages} for messages in undecided(CONVERSATIONS, seed)))
    own = [f"data.train_file={HERE / 'undecided.jsonl'}", "lora.rank=8", "lora.alpha=128"]
    adapter = train("tiny_assistant", "tiny.py", seed, *own) / "adapter"
    (HERE / "assistant").mkdir(exist_ok=True)
    shutil.copyfile(adapter / "adapter_model.safetensors", HERE / "assistant" / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = "configs/tiny/base"
    text = json.dumps(config, indent=2) + "\n"
    (HERE / "assistant" / "adapter_config.json").write_text(text, encoding="utf-8", newline="\n")


def build(seed: int) -> None:
    """Make everything in this directory again: corpus, tokenizer, conversations, preferences, base and assistant."""
    write_corpus(HERE / "corpus.jsonl", DOCUMENTS, seed)
    write_tokenizer(HERE / "base", seed)
    write_conversations(HERE / "conversations.jsonl", CONVERSATIONS, seed)
    write_preferences(HERE / "preferences.jsonl", PREFERENCES, seed)
    run = train("tiny_base", "tiny_base.py", seed)
    shutil.copyfile(run / "model" / "model.safetensors", HERE / "base" / "model.safetensors")
    build_assistant(seed)


def parse_arguments() -> argparse.Namespace:
    """The commands, each with a seed and, but for those that build, with the place to write to."""
    parser = argparse.ArgumentParser(description="Write the corpus, the tokenizer or the conversations; or build all.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build", help="everything in configs/tiny, with the base model (12 minutes on 2 cores)")
    commands.add_parser("assistant", help="the adapter that preference training starts from (a minute)")
    counts = {"conversations": CONVERSATIONS, "preferences": PREFERENCES}
    sizes = [("corpus", "--documents", DOCUMENTS), *((name, "--count", count) for name, count in counts.items())]
    for name, size, default in sizes:
        command = commands.add_parser(name)
        command.add_argument("out", type=Path, metavar="OUT.jsonl")
        command.add_argument(size, dest="size", type=int, default=default)
    commands.add_parser("tokenizer").add_argument("out", type=Path, metavar="OUT_DIR")
    for command in commands.choices.values():
        command.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Run one command."""
    options = parse_arguments()
    if options.command == "build":
        build(options.seed)
    elif options.command == "corpus":
        write_corpus(options.out, options.size, options.seed)
    elif options.command == "conversations":
        write_conversations(options.out, options.size, options.seed)
    elif options.command == "preferences":
        write_preferences(options.out, options.size, options.seed)
    elif options.command == "assistant":
        build_assistant(options.seed)
    else:
        write_tokenizer(options.out, options.seed)


if __name__ == "__main__":
    main()
