"""What happens in the newsroom's articles: kinds of events, and the sentences that belong to one kind.

Every kind has its things (`what`), its counted units, sentences that lead with all five facts, sentences that come back to one or two of
them, and the ways a reference summary states all five. Fields: `{who}` full name, `{last}` surname, `{what}`, `{where}`, `{when}` (after
"on"), `{count}`. Generic sentences that fit every kind are in `sentences.py`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """A kind of event.

    Attributes:
        kind: its name, for people.
        noun: what later sentences call it, after "the".
        whats: interchangeable things that it can be about, after "a" or "the".
        units: what is counted, in the plural.
        leads: sentences with all five facts.
        details: sentences with some of the facts.
        summaries: reference summaries with all five facts.
        headlines: short lines without an end mark.
    """

    kind: str
    noun: str
    whats: tuple[str, ...]
    units: tuple[str, ...]
    leads: tuple[str, ...]
    details: tuple[str, ...]
    summaries: tuple[str, ...]
    headlines: tuple[str, ...]


EVENTS = (
    Event(
        kind="opening",
        noun="opening",
        whats=(
            "library",
            "museum",
            "theatre",
            "bridge",
            "school",
            "market",
            "station",
            "gallery",
            "stadium",
            "clinic",
            "harbour",
            "garden",
        ),
        units=("guests", "residents", "visitors", "families"),
        leads=(
            "{who} opened a new {what} in {where} on {when} before {count} {unit}.",
            "A new {what} was opened by {who} in {where} on {when}, and {count} {unit} came to see it.",
            "The people of {where} have a new {what} after {who} cut the ribbon on {when} in front of {count} {unit}.",
            "On {when}, {count} {unit} watched as {who} opened the long awaited {what} in {where}.",
            "After years of delay, {where} saw its {what} opened on {when} by {who}, with {count} {unit} in the crowd.",
            "It was raining in {where} on {when} when {who} opened the {what} for {count} {unit}.",
        ),
        details=(
            "The doors of the {what} were held open by {last} until all {count} {unit} were inside.",
            "Work on the {what} in {where} had begun four years earlier.",
            "{last} called the {what} a gift to the town.",
            "Most of the {count} {unit} stayed for the music after the ribbon was cut.",
            "The {what} had been due to open long before {when}.",
            "Builders finished the roof of the {what} only a week before {last} arrived.",
        ),
        summaries=(
            "{who} opened a new {what} in {where} on {when}. {count} {unit} came to see it.",
            "A new {what} in {where} was opened on {when} by {who} before {count} {unit}.",
        ),
        headlines=("{last} opens {what} in {where}", "{where} gets its {what} at last", "{count} {unit} see new {what}"),
    ),
    Event(
        kind="strike",
        noun="strike",
        whats=(
            "bakery",
            "factory",
            "mine",
            "railway",
            "brewery",
            "shipyard",
            "mill",
            "laundry",
            "refinery",
            "warehouse",
            "cannery",
            "foundry",
        ),
        units=("workers", "drivers", "employees", "members"),
        leads=(
            "{who} led {count} {unit} of the {what} in {where} out on strike on {when}.",
            "A strike began at the {what} in {where} on {when} when {count} {unit} followed {who} through the gates.",
            "On {when}, {count} {unit} stopped work at the {what} in {where}, and {who} spoke for them.",
            "The {what} in {where} fell silent on {when} as {who} and {count} {unit} walked out over pay.",
            "Talks over pay broke down in {where}, and {who} called {count} {unit} of the {what} out on {when}.",
            "There was no work at the {what} in {where} on {when} after {who} asked {count} {unit} to stay away.",
        ),
        details=(
            "The owners of the {what} said that they could not pay more.",
            "{last} said the {unit} would stay out until the {what} made a better offer.",
            "Some of the {count} {unit} stood at the gates of the {what} through the night.",
            "Pay at the {what} has not risen for three years.",
            "The {what} had lost orders even before {when}.",
            "Shops in {where} sent bread and soup to the {count} {unit}.",
        ),
        summaries=(
            "{who} led {count} {unit} of a {what} in {where} out on strike on {when}.",
            "A {what} in {where} has been on strike since {when}. {who} leads {count} {unit}.",
        ),
        headlines=("{last} leads strike at {what}", "{count} {unit} walk out in {where}", "{what} in {where} falls silent"),
    ),
    Event(
        kind="fire",
        noun="fire",
        whats=(
            "barn",
            "hotel",
            "tower",
            "chapel",
            "workshop",
            "restaurant",
            "castle",
            "cinema",
            "garage",
            "pharmacy",
            "bookshop",
            "greenhouse",
        ),
        units=("people", "guests", "neighbours", "children"),
        leads=(
            "{who} brought {count} {unit} to safety when a {what} burned in {where} on {when}.",
            "A fire broke out in a {what} in {where} on {when}, and {who} led {count} {unit} out of the smoke.",
            "On {when}, flames destroyed a {what} in {where}, but {count} {unit} were saved by {who}.",
            "All {count} {unit} were safe after a fire in a {what} in {where} on {when}, thanks to {who}.",
            "Smoke rose over {where} on {when} as a {what} burned and {who} helped {count} {unit} to get away.",
            "When a {what} caught fire in {where} on {when}, {who} woke {count} {unit} and showed them the way out.",
        ),
        details=(
            "Little is left of the {what} but its walls.",
            "{last} had seen smoke above the {what} while walking home.",
            "The {count} {unit} spent the night in a school hall.",
            "Firefighters needed six hours to put out the flames in the {what}.",
            "The {what} had been checked by the fire service not long before {when}.",
            "{last} went back into the {what} twice to look for others.",
        ),
        summaries=(
            "{who} saved {count} {unit} from a fire in a {what} in {where} on {when}.",
            "A {what} burned down in {where} on {when}. {who} saved {count} {unit} from the fire.",
        ),
        headlines=("{last} saves {count} {unit} from fire", "Fire destroys {what} in {where}", "{what} burns in {where}"),
    ),
    Event(
        kind="discovery",
        noun="discovery",
        whats=(
            "ship",
            "temple",
            "mosaic",
            "skeleton",
            "treasure",
            "village",
            "manuscript",
            "painting",
            "cave",
            "fossil",
            "helmet",
            "statue",
        ),
        units=("coins", "bones", "stones", "objects"),
        leads=(
            "{who} found a buried {what} near {where} on {when}, with {count} {unit} beside it.",
            "A {what} lost for centuries was found by {who} near {where} on {when} together with {count} {unit}.",
            "On {when}, a team led by {who} dug up a {what} and {count} {unit} outside {where}.",
            "Farmland outside {where} gave up a {what} and {count} {unit} on {when}, to the joy of {who}.",
            "The field near {where} looked empty until {who} came upon a {what} and {count} {unit} on {when}.",
            "Experts confirmed that the {what} and {count} {unit} found near {where} on {when} by {who} are real.",
        ),
        details=(
            "The {what} may be more than a thousand years old.",
            "{last} had been looking for the {what} for most of a life.",
            "All {count} {unit} will be cleaned before they are shown.",
            "A museum has asked to keep the {what}.",
            "Nobody had searched the field before {when}, because the ground was too wet.",
            "{last} counted the {unit} twice and came to {count} each time.",
        ),
        summaries=(
            "{who} found a buried {what} together with {count} {unit} near {where} on {when}.",
            "A buried {what} was found near {where} on {when}. {who} also found {count} {unit}.",
        ),
        headlines=("{last} finds {what} near {where}", "{what} and {count} {unit} found", "Old {what} found near {where}"),
    ),
    Event(
        kind="festival",
        noun="festival",
        whats=(
            "dance",
            "comedy",
            "parade",
            "concert",
            "puppet show",
            "play",
            "ballet",
            "mime",
            "musical",
            "circus",
            "poetry night",
            "magic show",
        ),
        units=("singers", "dancers", "artists", "musicians"),
        leads=(
            "{who} staged a {what} with {count} {unit} in {where} on {when}.",
            "A {what} by {who} opened the summer festival in {where} on {when} with {count} {unit}.",
            "On {when}, {count} {unit} took part in a {what} that {who} had planned for {where}.",
            "The square in {where} was full on {when} for a {what} by {who} and {count} {unit}.",
            "Nobody in {where} had seen a {what} like the one that {who} put on with {count} {unit} on {when}.",
            "Lights went up in {where} on {when} for a {what} with {count} {unit}, the work of {who}.",
        ),
        details=(
            "{last} wrote the {what} during a long winter.",
            "The {what} went on until midnight.",
            "It took the {count} {unit} half a year to learn the {what}.",
            "Tickets for the {what} were sold out long before {when}.",
            "Many of the {count} {unit} had never been on a stage.",
            "{last} thanked the {unit} when the {what} was over.",
        ),
        summaries=(
            "{who} staged a {what} with {count} {unit} at a festival in {where} on {when}.",
            "{count} {unit} took part in a {what} in {where} on {when}. It was staged by {who}.",
        ),
        headlines=("{last} brings {what} to {where}", "{count} {unit} on stage in {where}", "{what} fills the square in {where}"),
    ),
    Event(
        kind="rescue",
        noun="rescue",
        whats=("ferry", "coach", "gondola", "boat", "balloon", "tram", "lift", "barge", "trolley", "canoe", "minibus", "yacht"),
        units=("passengers", "tourists", "pupils", "travellers"),
        leads=(
            "{who} rescued {count} {unit} from a {what} that broke down near {where} on {when}.",
            "A {what} with {count} {unit} got stuck near {where} on {when} until {who} came to help.",
            "On {when}, {count} {unit} were trapped in a {what} near {where} and freed by {who}.",
            "Near {where}, {who} needed a whole night to bring {count} {unit} home from a {what} on {when}.",
            "Fog stopped a {what} near {where} on {when}, and {who} went out to fetch its {count} {unit}.",
            "The trip ended badly for {count} {unit} near {where} on {when}, when their {what} failed and {who} had to rescue them.",
        ),
        details=(
            "The {what} was towed away the next morning.",
            "{last} carried the youngest of the {unit} out of the {what}.",
            "None of the {count} {unit} was hurt.",
            "The {what} had passed its last inspection.",
            "The {count} {unit} were given blankets and tea in {where}.",
            "{last} had trained for such a day, long before {when}.",
        ),
        summaries=(
            "{who} rescued {count} {unit} from a {what} that got stuck near {where} on {when}.",
            "A {what} broke down near {where} on {when}. All {count} {unit} were rescued by {who}.",
        ),
        headlines=("{last} rescues {count} {unit}", "{what} stuck near {where}", "{unit} freed from {what}"),
    ),
    Event(
        kind="vote",
        noun="vote",
        whats=(
            "tunnel",
            "reservoir",
            "prison",
            "dam",
            "casino",
            "highway",
            "canal",
            "quarry",
            "landfill",
            "racetrack",
            "wind farm",
            "power plant",
        ),
        units=("votes", "voters", "citizens", "councillors"),
        leads=(
            "{who} won the backing of {count} {unit} for a {what} in {where} on {when}.",
            "Plans for a {what} in {where} were approved on {when}, when {count} {unit} sided with {who}.",
            "On {when}, {count} {unit} said yes to the {what} that {who} wants to build in {where}.",
            "The council of {where} agreed to a {what} on {when} after {who} found {count} {unit} in favour.",
            "After a long debate in {where}, {who} got {count} {unit} behind the {what} on {when}.",
            "A {what} will be built in {where} after all, as {who} won over {count} {unit} on {when}.",
        ),
        details=(
            "The {what} will cost more than the town earns in a year.",
            "{last} promised that the {what} would bring jobs.",
            "Opponents of the {what} say they will go to court.",
            "Not all of the {count} {unit} were happy with the plan.",
            "{last} had argued for the {what} on every street corner.",
            "Before {when}, few had expected as many as {count}.",
        ),
        summaries=(
            "{who} won the support of {count} {unit} for a {what} in {where} on {when}.",
            "A {what} in {where} was approved on {when}. {count} {unit} voted with {who}.",
        ),
        headlines=("{last} wins vote on {what}", "{where} says yes to {what}", "{count} {unit} back {what}"),
    ),
    Event(
        kind="race",
        noun="race",
        whats=(
            "marathon",
            "regatta",
            "rally",
            "relay",
            "sprint",
            "bicycle race",
            "horse race",
            "ski race",
            "triathlon",
            "sled race",
            "swim",
            "hike",
        ),
        units=("runners", "rivals", "athletes", "starters"),
        leads=(
            "{who} beat {count} {unit} to win the {what} in {where} on {when}.",
            "The {what} in {where} was won on {when} by {who}, who left {count} {unit} behind.",
            "On {when}, {count} {unit} started in the {what} in {where}, and {who} came in first.",
            "Nobody among {count} {unit} was faster than {who} in the {what} in {where} on {when}.",
            "In heavy rain, {who} finished first of {count} {unit} in the {what} held in {where} on {when}.",
            "{where} has a new champion after {who} won the {what} on {when} against {count} {unit}.",
        ),
        details=(
            "{last} took the lead early in the {what}.",
            "The {what} has been held every year since the war.",
            "Only half of the {count} {unit} reached the finish.",
            "{last} had won the {what} once before.",
            "The course of the {what} leads twice around {where}.",
            "All {count} {unit} were cheered on by the crowd.",
        ),
        summaries=(
            "{who} beat {count} {unit} to win a {what} held in {where} on {when}.",
            "A {what} in {where} was won by {who} on {when}. {count} {unit} took part.",
        ),
        headlines=("{last} wins {what} in {where}", "{last} beats {count} {unit}", "{where} cheers {last} after {what}"),
    ),
    Event(
        kind="gift",
        noun="gift",
        whats=(
            "hospital",
            "shelter",
            "nursery",
            "college",
            "choir",
            "hospice",
            "farm",
            "kitchen",
            "zoo",
            "monastery",
            "youth club",
            "food bank",
        ),
        units=("books", "beds", "computers", "blankets"),
        leads=(
            "{who} gave {count} {unit} to a {what} in {where} on {when}.",
            "A {what} in {where} received {count} {unit} from {who} on {when}.",
            "On {when}, {count} {unit} arrived at a {what} in {where}, all of them paid for by {who}.",
            "There were tears at a {what} in {where} on {when} when {who} brought {count} {unit}.",
            "The {what} in {where} had asked for help for years before {who} sent {count} {unit} on {when}.",
            "A truck with {count} {unit} stopped at a {what} in {where} on {when}, sent by {who}.",
        ),
        details=(
            "The {what} will use the {count} {unit} at once.",
            "{last} was once cared for in the same {what}.",
            "A room of the {what} is to be named after {last}.",
            "The {what} depends on what people give.",
            "It took helpers a whole day to carry in the {count} {unit}.",
            "Until {when} the {what} had made do with very little.",
        ),
        summaries=(
            "{who} gave {count} {unit} as a gift to a {what} in {where} on {when}.",
            "A {what} in {where} was given {count} {unit} on {when}. They came from {who}.",
        ),
        headlines=("{last} gives {count} {unit} to {what}", "{what} in {where} thanks {last}", "{count} {unit} for {what}"),
    ),
    Event(
        kind="theft",
        noun="theft",
        whats=("bank", "jeweller", "mansion", "vault", "palace", "salon", "cathedral", "villa", "casket", "monastery", "studio", "depot"),
        units=("diamonds", "rings", "watches", "paintings"),
        leads=(
            "{who} was arrested in {where} on {when} with {count} {unit} stolen from a {what}.",
            "Police in {where} arrested {who} on {when} over {count} {unit} missing from a {what}.",
            "On {when}, {count} {unit} taken from a {what} were found at the home of {who} in {where}.",
            "The case of the {what} is solved: {who} was caught in {where} on {when} with {count} {unit}.",
            "Officers stopped {who} in {where} on {when} and found {count} {unit} from a {what} in the car.",
            "A {what} will get back its {count} {unit} after {who} was arrested in {where} on {when}.",
        ),
        details=(
            "The {what} had no alarm.",
            "{last} told officers that the {unit} were a present.",
            "The owner of the {what} wept when all {count} {unit} were laid out.",
            "A guard at the {what} had noticed {last} earlier.",
            "Nothing else was missing from the {what}.",
            "{last} has been in a cell since {when}.",
        ),
        summaries=(
            "{who} was arrested in {where} on {when} over a theft of {count} {unit} from a {what}.",
            "{count} {unit} were stolen from a {what}. {who} was arrested in {where} on {when}.",
        ),
        headlines=("{last} arrested over theft from {what}", "{count} {unit} found in {where}", "Police in {where} catch {last}"),
    ),
)
