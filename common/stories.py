"""
The built-in corpus: small stories whose entropy is known exactly, and their judge.

    tell(7).text                 a story; the same one on every machine
    tell(7).nats                 -log of its probability: what a perfect model would pay for it
    parse(text)                  the same from its text; ParseError says where the text errs

Measured over 20,000 stories: 78.6 nats and 164 words in the mean (105 to 198 words), 21 facts
recalled; 1,261 different words; more than 10^32 stories.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from common.grammar import Derivation, Grammar, ParseError, pick

# ----------------------------------------------------------------------------------------------
# The world, part 1: who and what there is. "cherry/cherries": behind the slash stands the plural,
# or the preposition of a place. No two things of one kind may be called the same.
# ----------------------------------------------------------------------------------------------

# fmt: off
GIRLS = """Ada, Bella, Clara, Dora, Elsie, Freya, Greta, Hazel, Ivy, Josie, Kira, Lucy, Mia, Nora,
    Olive, Poppy, Ruby, Sofia, Tilda, Una, Vera, Wanda, Yara, Zoe"""
BOYS = """Arlo, Ben, Caleb, Dylan, Emil, Felix, Gus, Hugo, Ian, Jonas, Karl, Leo, Max, Noah, Oscar,
    Peter, Quentin, Robin, Sam, Theo, Victor, Walter, Yusuf, Zack"""
LISTS = {  # list -> (kind, members)
    "count": ("number", """zero, one, two, three, four, five, six, seven, eight, nine, ten,
        eleven, twelve, thirteen, fourteen, fifteen, sixteen, seventeen, eighteen, nineteen,
        twenty"""),
    "girls": ("name", GIRLS),
    "boys": ("name", BOYS),
    "people": ("name", GIRLS + ", " + BOYS),
    "pets": ("pet", """Acorn, Biscuit, Button, Cinnamon, Clover, Dumpling, Feather, Ginger,
        Marble, Mopsy, Nutmeg, Pebble, Pepper, Pickle, Pumpkin, Rascal, Smudge, Socks, Sunny,
        Toffee, Twig, Whiskers"""),
    "kin": ("kin", """mother, father, grandmother, grandfather, aunt, uncle, big sister, big
        brother, godmother, cousin"""),
    "jobs": ("job", """baker, blacksmith, carpenter, clockmaker, cobbler, doctor, farmer,
        fisherman, gardener, miller, painter, potter, schoolteacher, shepherd, tailor, weaver"""),
    "menders": ("job", "blacksmith, carpenter, clockmaker, cobbler, tinker, toymaker, wheelwright"),
    "companions": ("animal", """beagle, duckling, ferret, goat, goose, guinea pig, kitten,
        lamb, magpie, parrot, piglet, poodle, puppy, rabbit, terrier"""),
    "wanderers": ("animal", """badger, donkey, fox, goat, hare, hedgehog, otter, owl, pony,
        raccoon, sheepdog, squirrel"""),
    "herds": ("animal", """calf/calves, cow/cows, duck/ducks, goat/goats, goose/geese,
        hen/hens, pony/ponies, sheep/sheep, turkey/turkeys"""),
    "colours": ("colour", """amber, black, blue, brown, golden, green, grey, orange, pink,
        purple, red, silver, turquoise, violet, white, yellow"""),
    "things": ("object", """backpack, ball, basket, bell, blanket, boat, bucket, cap, cushion,
        doll, drum, flute, guitar, hoop, jar, kite, lantern, mask, mirror, paintbox, pinwheel,
        puppet, purse, ribbon, scarf, shawl, sledge, spinning top, teapot, telescope, trumpet,
        umbrella, wagon, whistle, xylophone"""),
    "toys": ("object", """ball, boat, doll, drum, flute, guitar, hoop, kite, mask, paintbox,
        pinwheel, puppet, sledge, spinning top, telescope, trumpet, wagon, xylophone"""),
    "mendables": ("object", """boat, doll, drum, flute, guitar, kite, lantern, mask, music box,
        puppet, sledge, telescope, trumpet, umbrella, wagon, xylophone"""),
    "signals": ("object", "bell, drum, flute, lantern, torch, trumpet, whistle"),
    "lights": ("object", "candle, lamp, lantern, torch"),
    "collars": ("object", "bell, collar, ribbon, scarf"),
    "vessels": ("object", "backpack, basket, bowl, box, bucket, jar, tin"),
    "bags": ("object", "backpack, bag, basket, pot, purse, sack"),
    "gifts": ("object", """basket, blanket, bowl, cap, cushion, lantern, mask, necklace,
        puppet, purse, scarf, shawl"""),
    "bakes": ("food", """bun/buns, cookie/cookies, muffin/muffins, pancake/pancakes,
        roll/rolls, tart/tarts, waffle/waffles"""),
    "foods": ("food", """apple/apples, apricot/apricots, bun/buns, carrot/carrots,
        cherry/cherries, cookie/cookies, dumpling/dumplings, fig/figs, muffin/muffins,
        nut/nuts, pancake/pancakes, peach/peaches, pear/pears, plum/plums, radish/radishes,
        roll/rolls, sandwich/sandwiches, strawberry/strawberries, tart/tarts, waffle/waffles"""),
    "homes": ("home", """attic, bungalow, cabin, caravan, cottage, farmhouse, hut, inn,
        lighthouse, mill, schoolhouse, tower"""),
    "landmarks": ("landmark", """beach, station, canal, cliffs, crossroads, forest, harbour,
        lake, market, moor, railway, river, sawmill, ferry, vineyard, waterfall"""),
    "places": ("place", """bridge/under, chapel/behind, clearing/in, clover field/in,
        dovecote/by, duck pond/by, fountain/by, greenhouse/in, haystack/behind, hill/on, hollow
        oak/under, lane/in, library/behind, meadow/in, orchard/in, park/in, playground/on,
        quarry/in, rose garden/in, ruins/in, school/behind, sheep fold/by, spring/by, stone
        wall/by, tea house/behind, walnut tree/under, watchtower/by, well/by"""),
    "corners": ("place", """chapel/behind, duck pond/by, fountain/by, hill/on, lane/in,
        library/behind, school/behind, sheep fold/by, spring/by, watchtower/by, well/by"""),
    "pastures": ("place", "clearing/in, clover field/in, hill/on, meadow/in, orchard/in, park/in"),
    "shelters": ("place", "barn/in, boathouse/in, cave/in, cowshed/in, stable/in, woodshed/in"),
    "deeds": ("deed", """baked bread, brushed the pony, built a wall, carried water, chopped
        wood, cleaned the stove, cooked soup, counted the sheep, dug a hole, dusted the shelf,
        fed the hens, fetched the post, filled the trough, fixed the gate, folded the sheets,
        gathered eggs, hung up the washing, laid the table, lit the fire, mended a sock, milked
        the cow, opened the windows, painted the fence, peeled potatoes, picked beans, planted
        a tree, polished the spoons, raked the leaves, scrubbed the floor, sorted buttons,
        stacked hay, swept the yard, washed the cups, watered the roses, weeded the path, wound
        the clock"""),
    "few": ("number", "one, two, three, four"),
    "many": ("number", """four, five, six, seven, eight, nine, ten, eleven, twelve, thirteen,
        fourteen, fifteen, sixteen, seventeen, eighteen, nineteen, twenty"""),
    "numbers": ("number", "four, five, six, seven, eight, nine, ten, eleven, twelve"),
}

# ----------------------------------------------------------------------------------------------
# The world, part 2: what happens, in the templates of common/grammar.py.
#
# A plot is a list of steps, a step a list of ways to tell it; "" is a new paragraph. Every plot
# that ends with <ending> names hero, kin, home, near (in <opening>), friend, colour, thing and
# place, which are recalled there. A step that could be either of two people's would leave the
# judge in doubt: avoid it.
# ----------------------------------------------------------------------------------------------

PHRASES = {
    "nice": [
        "little|young|cheerful|curious|quiet|merry|clever|shy|lively|kind|brave|dreamy|busy"
        "|gentle|patient|thoughtful|freckled|red-haired|bright|nimble",
    ],
    "old": [
        "tiny|crooked|tall|narrow|cosy|whitewashed|sturdy|wooden|mossy|sunny|draughty|tidy"
        "|wind-blown|thatched|modest|low|crowded|creaky",
    ],
    "child": ["girl [named|called] {hero:girls}", "boy [named|called] {hero:boys}"],
    "opening": [
        "Once upon a time, there was a <nice> <child> who lived with {hero.his} {kin:kin} in a"
        " <old> {home:homes} by the {near:landmarks}.",
        "Once upon a time, in a <old> {home:homes} by the {near:landmarks}, there lived a <nice>"
        " <child> with {hero.his} {kin:kin}.",
        "In a <old> {home:homes} by the {near:landmarks} lived a <nice> <child> and {hero.his}"
        " {kin:kin}.",
        "{hero:people} and {hero.his} {kin:kin} lived in a <old> {home:homes}, [close to|not far"
        " from|just behind] the {near:landmarks}.",
        "[Long ago|Many years ago|Not so long ago], a <nice> <child> lived by the"
        " {near:landmarks}, in a <old> {home:homes} that belonged to {hero.his} {kin:kin}.",
        "This is the story of {hero:people}, a <nice> {hero.girl} who shared a <old> {home:homes}"
        " by the {near:landmarks} with {hero.his} {kin:kin}.",
        "By the {near:landmarks} stood a <old> {home:homes}, and there {hero:people} lived with"
        " {hero.his} {kin:kin}.",
        "Everybody by the {near:landmarks} knew {hero:people}, the <nice> {hero.girl} from the"
        " <old> {home:homes}, and {hero.his} {kin:kin}.",
        "There was once a <nice> <child>. With {hero.his} {kin:kin} {hero.he} lived in a <old>"
        " {home:homes} near the {near:landmarks}.",
    ],
    "sky": ["sunny|misty|windy|frosty|warm|cloudy|chilly|bright|breezy|mild|drizzly|hazy|grey"],
    "weekday": ["Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday"],
    "oneday": [
        "One [<sky>|crisp|golden|glorious] [morning|afternoon|day]",
        "[On a|One] <sky> <weekday>",
        "One [morning|afternoon|day] in [early|late] [spring|summer|autumn]",
        "One <weekday>, when it was <sky> outside",
        "[One fine day|On the first day of spring|Shortly before the harvest]",
    ],
    "walked": ["walked|ran|hurried|skipped|strolled|raced|marched"],
    "joy": ["happy|glad|delighted|pleased|cheerful|overjoyed|content|thankful"],
    "sadly": ["sadly|quietly|with a sigh|in a small voice|with tears in {hero.his} eyes"],
    "said": ["said|answered|replied"],
    "sadly_f": ["sadly|quietly|with a sigh|in a small voice|with tears in {friend.his} eyes"],
    "warm": ["smiled|laughed|beamed|grinned|clapped|nodded|chuckled"],
    "ending": [
        "4*<afterwards>",
        "That [evening|night] {hero} sat in the {home} by the {near} and told {hero.his} {kin}"
        " [all|everything] about {friend} and the {colour} {thing}.",
        '"What a day you have had!" said {hero.his} {kin} when {hero} came back to the {home}.'
        ' {hero} thought of {friend} and the {colour} {thing}, and [smiled|slept soundly].',
        'At supper in the {home}, {hero.his} {kin} asked what the best part had been. "{friend},"'
        ' said {hero} [at once|without thinking|with a full mouth], "and then the {thing}."',
        "{hero}'s {kin} [drew|painted|made] a picture of {hero} and {friend} with the {colour}"
        " {thing}. It still hangs in the {home} by the {near}.",
    ],
    "afterwards": [
        "Long afterwards, whenever {hero} [passed|saw|walked past|came to] the {place}, {hero.he}"
        " thought of {friend} and the {colour} {thing}, and smiled.",
        "If you ever come to the {home} by the {near}, ask {hero} about the {colour} {thing}."
        " {hero.He} will [gladly|proudly|happily] tell you about {friend}, too.",
        "When the [moon|first star] rose over the {near}, {hero.his} {kin} [hummed|sang] a song,"
        " {hero} [yawned|smiled], and somewhere {friend} was just as <joy>.",
        "From that day on, {hero} and {friend} met {at place} [every week|every Sunday|whenever"
        " they could] and [often|always] talked about the {colour} {thing}.",
    ],
    "lesson": [
        '"{hero}, I am proud of you," said {hero.his} {kin}.',
        "{hero} felt [warm|light|calm] inside, as if after [a hot bath|a mug of cocoa].",
        "{hero} had [seldom|never|hardly ever] been so <joy>.",
        '"This was a good day," thought {hero}, and {hero.he} was right.',
        '"A friend is worth more than a hundred treasures," {hero.his} {kin} liked to say.',
        "And {hero} [learned|discovered|found out] that [a small heart can be brave|two carry"
        " trouble more easily than one|kind words open doors|patience is a kind of magic].",
    ],
    # What people tell each other in the plots of the end
    "riddle": ["<<who>>", "<<where>>", "<<how_many>>"],
    "close": [
        "{hero} <warm>, and {friend} was <joy>.",
        "And so the time flew for {hero} and {friend}.",
        "It had been a good time, thought {hero}, and {friend} thought so, too.",
    ],
    "pack": [  # each repeats the one before and adds to it
        'I take {a a:things}." "I take {a a} and {a b:things}." "I take {a a}, {a b} and {a'
        ' c:things}." "I take {a a}, {a b}, {a c} and {a d:things}.',
        'First I {a:deeds}." "First I {a}, then I {b:deeds}." "First I {a}, then I {b}, then I'
        ' {c:deeds}.',
        '{a:people} knows {b:people}." "{a} knows {b}, and {b} knows {c:people}." "{a} knows {b},'
        ' {b} knows {c}, and {c} knows {d:people}.',
    ],
    "tale": [
        "[One day|On <weekday>] {hero} lost {hero.his} {colour} {thing} {at place:places}."
        " {hero.He} [was sad|cried], but {friend} found the {thing} [under a bush|behind a"
        " barrel]. So {hero} [hugged|thanked] {friend}.",
        "[One day|On <weekday>] {hero} saw {a colour} {thing} in a shop {at place:corners}."
        " {friend} [had money|knew the shopkeeper] and bought it for {hero}. {hero} carried the"
        " {thing} home, and {friend} was <joy>.",
        "[One day|On <weekday>] {hero} broke {friend}'s {colour} {thing}. The {job:menders}"
        " mended it for a plate of {food:foods.s}. {hero} brought the {food.s}, and {friend} was"
        " <joy>.",
        "[One day|On <weekday>] {hero} met a hungry {beast:wanderers} and gave it {food:foods.s}."
        " When the {food.s} were gone, the {beast} showed {hero} {a colour} {thing} {at"
        " place:places}. The {thing} [turned out to be|was] {friend}'s.",
    ],
    "farewell": [
        "That was the story of {hero}, {friend} and the {colour} {thing}.",
        "Good night, {hero}! Good night, {friend}!",
        "And the {colour} {thing}? It is [still there|waiting for tomorrow|as bright as ever].",
        "Back in the {home} by the {near}, [there was soup for two|the kettle was singing].",
    ],
}

PLOTS = {
    "lost and found": [
        ["{hero} had {a colour:colours} {thing:things}, and {hero.he} took it [everywhere"
         "|wherever {hero.he} went|to breakfast, to school and to bed].",
         "What {hero} loved most was {a colour:colours} {thing:things} that {hero.his} {kin} had"
         " [made|chosen|saved] for {hero.him}.",
         "Nothing in the world was dearer to {hero} than {hero.his} {colour:colours}"
         " {thing:things}."],
        ["<oneday>, {hero} and {friend:people} <walked> to the {place:places}, and after that"
         " they [played|rested|picnicked|told riddles] {at spot:places}.",
         "<oneday>, {hero} met {friend:people} {at place:places}. Later they [built a den|flew"
         " paper birds|picked daisies|looked for snails] {at spot:places}."],
        ["With them came {pet:pets}, {friend}'s {beast:companions}.",
         "{friend} had brought {friend.his} {beast:companions}, {pet:pets}.",
         "{friend}'s {beast:companions}, {pet:pets}, [trotted|scurried|bustled] behind."],
        [""],
        ['On the way home {hero} [suddenly stopped|stood still|turned pale]. "My {thing}!"'
         ' {hero.he} [cried|gasped|whispered]. "It is gone!"',
         "When it was time to go, {hero} [looked around|searched {hero.his} bag|felt in both"
         " pockets]. The {thing} was gone!",
         '"{friend}, I have lost my {thing}," {hero} said <sadly> at the garden gate.'],
        ["\"[Don't cry|Don't worry|Cheer up]!\" said {friend}. They [looked|searched] {at place}"
         " first, but there they found only {a tint:colours} {other:things} without an owner.",
         "{friend} [took|squeezed] {hero.his} hand. Back {at place}, they peered [under bushes"
         "|behind stones|into corners], but all they saw was an old {tint:colours}"
         " {other:things}."],
        ["Then they tried {at spot}. {pet} [sniffed|listened|looked around] and [dashed|darted"
         "|pattered] to [a heap of leaves|a patch of nettles|a fallen log], and there lay the"
         " {thing}!",
         '"Perhaps {pet} can help," said {friend}. And truly, {at spot} the {beast} [stopped'
         '|began to scratch|made a great noise]. [Under some ferns|Between two roots] lay the'
         ' {thing}!'],
        [""],
        ['{hero} [hugged|thanked|patted] the {beast} first and {friend} next. "Without you two I'
         ' would have [given up|cried all night]," {hero.he} said.',
         '"You are the cleverest {beast} in the world, {pet}!" [cried|called|shouted] {hero},'
         ' and {friend} <warm>.',
         "{hero} gave {pet} a [biscuit|carrot|cuddle] and let {friend} carry the {thing} home."],
        ["3*<ending>", "<lesson> <farewell>"],
    ],
    "broken and mended": [
        ["{hero} and {friend:people} had been friends [since they were babies|for years|ever"
         " since their first day at school].",
         "Next door lived {friend:people}, and {hero} [played|laughed|climbed trees] with"
         " {friend.him} every day."],
        ["<oneday>, {hero} showed {friend} something new {at place:places}: {a colour:colours}"
         " {thing:mendables}.",
         "<oneday>, they played {at place:places} with the {colour:colours} {thing:mendables}"
         " that {hero} had got from {hero.his} {kin}."],
        ["{friend} [stumbled over a root|tripped on a stone|slipped in the mud], and [crack"
         "|crash|snap], the {thing} was broken.",
         '"May I [hold|try] it?" asked {friend}. But it slid from {friend.his} fingers and broke'
         ' [in two|on the ground].'],
        ['"I am so sorry, {hero}," [stammered|whispered|sobbed] {friend}. {hero} [swallowed hard'
         '|took a deep breath|bit {hero.his} lip]. "You did not mean to," {hero.he} said.',
         '{friend} [began to cry|turned red|hung {friend.his} head]. "It was an accident," said'
         ' {hero} [kindly|softly|after a while].'],
        [""],
        ["[Glue|String|Sticky tape|Wax] did not hold, so they took the pieces to the"
         " {job:menders} {at spot:corners}.",
         "{At spot:corners} lived {a job:menders} with [clever hands|a hundred tools|endless"
         " patience]. There they took the {colour} {thing}."],
        ['"I will do it for {n:numbers} {food:foods.s}," said the {job}. {hero} had only {k:part'
         ' n} at home, so {friend} [fetched|found|brought] the other {n-k}.',
         "The {job} [looked at it|scratched one ear|put on a pair of glasses] and asked for"
         " {n:numbers} {food:foods.s}. {friend} brought {k:part n}, and {hero} the {n-k} that"
         " were missing."],
        ["They brought the {food.s}, and there stood the {thing}, [as good as new|stronger than"
         " before|without a scratch]!",
         "The next [day|morning], the {job} took the {n} {food.s}, <warm> and gave them the"
         " {thing}."],
        [""],
        ['"Now it is [partly|half] yours," {hero} told {friend}, "because we saved it together."',
         "{friend} was so <joy> that {friend.he} [danced|whistled|turned a somersault], and"
         " {hero} carried the {thing} in both arms.",
         '"Next time you [hold|try] it first," said {hero}, and {friend} [blushed|<warm>].'],
        ["3*<ending>", "<lesson> <farewell>"],
    ],
    "a wish and the work for it": [
        ['<oneday>, {hero} saw {a colour:colours} {thing:things} in the window of the shop {at'
         ' place:corners}. "How I wish it were mine!" {hero.he} [said|sighed|thought].',
         "There was a shop {at place:corners}, and in its window stood {a colour:colours}"
         " {thing:things} that {hero} [looked at|admired|dreamed of] every day."],
        ["It cost {n:numbers} coins. {hero} [counted|emptied] {hero.his} money box and found"
         " only {k:part n}.",
         '"{n:numbers.Cap} coins, please," said the shopkeeper. But {hero} had no more than'
         ' {k:part n}.'],
        ['"{n-k.Cap} more," {hero.he} [sighed|murmured|counted]. "I shall have to earn them."',
         "So {n-k} coins were missing, and {hero} [made up {hero.his} mind|decided] to earn them."],
        [""],
        ["First {hero.he} helped the {job:jobs} [sweep the floor|carry water|stack firewood|wash"
         " the windows]. Then {friend:people} [joined in|asked to help], and together they"
         " [weeded|raked|watered] the garden {at spot:corners}.",
         '"The {job:jobs} needs [a pair of hands|somebody to run errands]," said'
         ' {friend:people}. They worked there all [week|morning], and then they [picked berries'
         '|painted the fence] {at spot:corners}.',
         "{friend:people} lived {at spot:corners}, and [a fence there wanted painting|the geese"
         " there had to be watched]. They did it together, and the {job:jobs} next door paid"
         " them."],
        ['"Look, {a tint:colours} {other:things}! That costs [less|only two coins]," said'
         ' {friend}. But {hero} [shook {hero.his} head|would not hear of it]. "I want the'
         ' {thing}."',
         'In the evening {hero} [nearly|almost] spent it all on {a tint:colours} {other:things}.'
         ' "Think of the {thing}," {friend} [warned|reminded {hero.him}|whispered].'],
        [""],
        ["At last {hero} had earned the {n-k} coins. {hero.He} <walked> back to the {place} and"
         " laid all {n} [on the counter|in a row|in the shopkeeper's hand].",
         "When the {n} coins were complete, {hero} and {friend} <walked> to the {place}. The"
         " {thing} was still [there|in the window|waiting]!"],
        ['"You worked [hard|bravely|like a little ant] for it," [said|remarked] the {job}, and'
         ' {hero} <warm>.',
         '"It is even more beautiful than I thought," [said|whispered] {hero}. "{friend}, half'
         ' of it is thanks to you!"',
         "{hero} carried the {colour} {thing} home [like a crown|as carefully as an egg], and"
         " {friend} [sang|danced] beside {hero.him}."],
        ["3*<ending>", "<lesson> <farewell>"],
    ],
    "a fear overcome": [
        ["{hero} was [brave|bold|fearless] in most things, but [the dark|a moonless night|every"
         " shadow] frightened {hero.him}. Only {friend:people} next door knew.",
         "Only {friend:people} knew that {hero} was [terribly|dreadfully] afraid [after sunset"
         "|in dark places]."],
        ["<oneday>, they played with {a colour:colours} {thing:toys} {at place:places}. Only at"
         " bedtime did {hero} miss it.",
         "<oneday>, {hero} left {hero.his} {colour:colours} {thing:toys} {at place:places}. By"
         " the time {hero.he} noticed it, the sun had [set|gone down]."],
        ["\"It [will rain tonight|may be gone tomorrow],\" said {hero.his} {kin}. \"You had"
         " better fetch it.\" {hero}'s [knees|hands|lips] trembled.",
         "How could {hero} [sleep|rest] without it? But outside it was [black as ink|pitch dark"
         "|dim and still]."],
        [""],
        ['{friend} came along with {a light:lights}. "We shall count our steps," {friend.he}'
         ' said. "{n:numbers.Cap} steps, and then we [rest|stop and listen]."',
         '"I have {a light:lights}," said {friend}. "After every {n:numbers} steps we will [sing'
         ' a song|stop and breathe|tell a joke]."'],
        ['The way led past the {spot:places}. Something [rustled|scratched|moaned|snorted]'
         ' there. "A [ghost|monster|troll]!" [whispered|gasped] {hero}.',
         "{At spot:places} two [green|shining|round] eyes looked at them. {hero} wanted to [run"
         "|turn back|hide]."],
        ["{friend} lifted the {light}. It was only {a beast:wanderers}, [looking for its supper"
         "|as frightened as they were|out for a walk]!",
         "In the glow of the {light} stood {a beast:wanderers}, and it [yawned|blinked|sneezed]."],
        ["{n.Cap} steps more, and another {n}, and [under a bush|on a bench|beside the path] lay"
         " the {colour} {thing}.",
         "So they went on, {n} steps and {n} steps again, until they came to the {place} and"
         " {hero} [grabbed|picked up] the {thing}."],
        [""],
        ['On the way back {hero} carried the {light}. {At spot} {hero.he} [called|said], "Good'
         ' night, little {beast}!"',
         'When they passed the {spot} again, {hero} was not trembling any more. "The dark is'
         ' only [a big blanket|the day asleep]," {hero.he} told {friend}.'],
        ["3*<ending>", "<lesson> <farewell>"],
    ],
    "a new friend": [
        ["{hero} [often felt lonely|had nobody to play with|wished for a friend]. {hero.He}"
         " [spent whole days|sat for hours] {at place:places} with {hero.his} {colour:colours}"
         " {thing:toys}.",
         "[Day after day|Every afternoon], {hero} sat alone {at place:places} and [talked to"
         "|played with|hummed to] {hero.his} {colour:colours} {thing:toys}."],
        ["<oneday>, a [cart|wagon|van] full of [furniture|boxes] stopped {at spot:corners}. A"
         " [girl named {friend:girls}|boy named {friend:boys}] climbed out, with {a"
         " beast:companions} called {pet:pets}.",
         "<oneday>, new people moved in {at spot:corners}. They had [a daughter, {friend:girls}"
         "|a son, {friend:boys}], and {a beast:companions} called {pet:pets}."],
        [""],
        ["{hero} was too [shy|timid] to speak, and {friend} [looked at the ground|hid behind the"
         " door]. But the {beast} ran straight to {hero} and [nibbled {hero.his} fingers|pulled"
         " at {hero.his} sleeve|sat down on {hero.his} foot].",
         '"Hello," said {hero}, but {friend} [did not answer|looked away]. Just then {pet}'
         ' [slipped away|broke loose], and they had to [chase|catch] the {beast} together.'],
        ['"{pet} likes you," said {friend} [softly|in surprise]. "At my old home I had'
         ' {n:numbers} friends. Here I know nobody."',
         '"I had {n:numbers} friends where I come from," {friend} [said|told {hero.him}]. "Here'
         ' I have only {pet}."'],
        ['"Now you have me," {hero} <said> and held out the {thing}. "Would you like to play'
         ' with it?"',
         '{hero} [pressed|laid] the {thing} into {friend.his} hands. "It is more fun with two,"'
         ' {hero.he} said.'],
        [""],
        ["They played until [sunset|the bells rang|it grew dark]. {friend} shared {k:numbers}"
         " {food:foods.s} with {hero}, and {pet} [got the crumbs|stole the last one].",
         "{friend}'s mother gave them {k:numbers} {food:foods.s}, and they ate them {at place}"
         " while {pet} [snored|begged|watched every bite]."],
        ['"Then I have {n+1} friends now," [counted|laughed] {friend}, "{n} far away and one'
         ' here."',
         'Before going back to the {spot}, {friend} [tied a ribbon to|painted a star on] the'
         ' {thing}, "so that you think of me and {pet}."',
         '"Shall I come to the {spot} tomorrow?" asked {hero}. "Come early," said {friend}, "and'
         ' bring the {thing}!"'],
        ["3*<ending>", "<lesson> <farewell>"],
    ],
    "a quarrel": [
        ["{hero} and {friend:people} were [the best of friends|like two peas in a pod|always"
         " together], until [they both wanted the same thing|something silly came between them].",
         "Nobody could [play|laugh] with {hero} as well as {friend:people}, but even good"
         " friends [quarrel sometimes|can fall out]."],
        ['<oneday>, they found {a colour:colours} {thing:toys} {at place:places}. "I saw it'
         ' first!" cried {hero}. "No, I did!" [cried|shouted|screamed] {friend}.',
         '<oneday>, {hero.his} {kin} gave them {a colour:colours} {thing:toys} to share {at'
         ' place:places}. "You always go first!" [cried|shouted|snapped] {friend}.'],
        ["They [pulled and tugged|pushed and shouted], and [at last|in the end] {friend} [ran"
         " off|marched away|stamped off] to the {spot:places}.",
         '"Then I will never play with you again!" said {hero}, and {friend} went to the'
         ' {spot:places} [without a word|in a rage|all alone].'],
        [""],
        ["But the {thing} was no fun alone. After {n:numbers} minutes {hero} [was bored|put it"
         " down] and went to [see|ask] the {job:jobs}.",
         "\"Why such a long face?\" asked the {job:jobs}. {n:numbers.Cap} times {hero} said that"
         " it was {friend}'s fault, and each time {hero.he} was less sure."],
        ['"I once lost a friend over {a tint:colours} {other:things}," said the {job}. "I still'
         ' [miss|think of] that friend, but never the {other}."',
         'The {job} [thought for a while|smiled]. "Which is easier to find again, {a'
         ' tint:colours} {other:things} or a friend?"'],
        ['{hero} [jumped up|understood] and [ran|raced|hurried] to the {spot}. "I was [unfair'
         '|wrong|silly]," {hero.he} said. "You [can|shall] have the {thing} first."',
         '{At spot} {hero} found {friend}, whose eyes were [red|wet]. "I am sorry," they both'
         ' said at the same [moment|time].'],
        [""],
        ["They agreed that the {thing} should [live|stay] with {friend} for {m:numbers} days and"
         " then with {hero} for {m}.",
         '"You play {m:numbers} minutes, and then I play {m}," said {friend}, and so they did,'
         ' until [they forgot to count|nobody cared about turns].',
         "{friend} <warm>, and they [took|carried] the {thing} back to the {place} and played"
         " there for {m:numbers} hours."],
        ["3*<ending>", "<lesson> <farewell>"],
    ],
    "a contest": [
        ["<oneday>, there was to be a great [race|run] from the {place:places} to the"
         " {spot:places}, and the prize was {a colour:colours} {thing:things}.",
         "Every [spring|summer|autumn] the children ran from the {place:places} to the"
         " {spot:places}. This time the prize was {a colour:colours} {thing:things}."],
        ["{n:numbers.Cap} children wanted to run. The fastest was {rival:people}, and the"
         " smallest was {friend:people}.",
         '{n:numbers.Cap} children were at the start. "I always win," [boasted|bragged]'
         ' {rival:people}. "I never do," said {friend:people} shyly.'],
        ['"I will [do my best|try]," said {hero}, and {hero.his} {kin} tied {hero.his} shoes'
         ' [with double knots|tightly].',
         "\"Just run [as you always do|for the fun of it],\" said {hero}'s {kin}."],
        [""],
        ['"Ready, steady, go!" called the {job:jobs}. {rival} [shot|flew|stormed] ahead, {hero}'
         ' came second, and {friend} fell behind.',
         "The {job:jobs} [blew a horn|waved a flag], and off they went, {rival} in front, {hero}"
         " close behind and {friend} last."],
        ['Halfway, {a beast:wanderers} crossed the path, and {friend} fell. "[Ouch|Oh], my [knee'
         '|ankle|foot]!" {hero} heard it and turned round.',
         "Then {friend} [tripped|stumbled] over {a beast:wanderers}. {hero} looked at the road"
         " ahead, and then {hero.he} [ran|went] back."],
        ['"Run on, or {rival} will win!" said {friend}. "[Never mind|Let {rival.him}]," {hero}'
         ' <said>.',
         '"Can you stand?" asked {hero}. {friend} nodded, and [arm in arm|step by step] they'
         ' went on.'],
        [""],
        ['{rival} had long been [resting|waiting] {at spot} when they came, last of all {n}. But'
         ' {rival.he} [thought hard|turned red] and said, "{hero} should have the {thing}."',
         'They reached the {spot} last, and [everybody cheered|the people clapped]. "{rival} was'
         ' the fastest," said the {job}, "but {hero} was the kindest." And {hero} got the'
         ' {thing}.'],
        ["{hero} let {friend} [hold|carry] the {thing} first, and even {rival} <warm>.",
         '"Next year all three of us shall run together," said {rival}, and {friend} <warm>.',
         '"Thank you for coming back," {friend} whispered, and {hero} shared the {thing} with'
         ' {friend.him}.'],
        ["3*<ending>", "<lesson> <farewell>"],
    ],
    "a journey": [
        ["<oneday>, {hero}'s {kin} said, \"{friend:people} is ill. Will you take {friend.him}"
         " this {colour:colours} {thing:things}? And here are {n:numbers} {food:foods.s}.\"",
         '<oneday>, {hero} heard that {friend:people} was [in bed with a cough|ill with a'
         ' fever]. "I will bring {friend.him} my {colour:colours} {thing:things} and {n:numbers}'
         ' {food:foods.s}," {hero.he} said.'],
        ["The long way to {friend}, who lived {at spot:corners}, led past the {place:places}.",
         "{friend} lived {at spot:corners}, and {hero} had to [walk|hike] by way of the"
         " {place:places}."],
        [""],
        ['{At place} waited {a beast:wanderers} that [looked thin|whimpered]. "You must be'
         ' hungry," said {hero}, and gave it {k:part n} {food.s}. Now there were {n-k} left.',
         "Soon {hero} met {a beast:wanderers} [with a thorn in its foot|with hungry eyes]. They"
         " shared {k:part n} of the {food.s}. {n-k.Cap} remained."],
        ['Then the path split in two. "Left or right?" [wondered|asked] {hero}. The {beast} [ran'
         '|went] ahead to the [left|right].',
         "Then [thick fog|a thick mist] came up. The {beast} [nudged {hero.him}|tugged at"
         " {hero.his} coat] and showed {hero.him} the way."],
        ['A [pedlar|stranger] wanted to swap {a tint:colours} {other:things} for the {thing}.'
         ' "[No, thank you|It is not for sale]," said {hero}. "It is for a friend."',
         "They passed {a tint:colours} {other:things} [on a gatepost|in the grass|under a"
         " signpost], but {hero} did not stop."],
        [""],
        ['At last they stood {at spot}. "Who is that with you?" [cried|called] {friend}. "This'
         ' {beast} [showed me the way|saved me]," {hero} <said>.',
         'When {hero} [knocked|came in], {friend} sat up in bed. "I had help," said {hero}, and'
         ' the {beast} [peeped|came] in, too.'],
        ["{hero} laid the {colour} {thing} and the {n-k} {food.s} on the blanket, and {friend}'s"
         " [cheeks grew pink|eyes shone].",
         "They ate the {n-k} {food.s} together, and with the {colour} {thing} in {friend.his}"
         " arms {friend} [already felt better|forgot to cough]."],
        ["3*<ending>", "<lesson> <farewell>"],
    ],
    "a surprise": [
        ["In {n:numbers} days it would be the birthday of {hero}'s {kin}. \"I want to [give"
         "|make] something special,\" {hero} told {friend:people}.",
         "{hero}'s {kin} had a birthday coming, in only {n:numbers} days. {hero} asked"
         " {friend:people} for [help|advice]."],
        ["So they [began|set to work] {at place:places}, where nobody would look, and made {a"
         " colour:colours} {thing:gifts}.",
         "They [decided on|wanted to make] {a colour:colours} {thing:gifts}, and they worked on"
         " it in secret {at place:places}."],
        ["{friend}'s {beast:companions}, {pet:pets}, [kept watch|helped in its own way|got in"
         " the way].",
         "{pet:pets}, {friend}'s {beast:companions}, [watched|slept beside them|played with the"
         " scraps]."],
        [""],
        ["[Every day|Again and again] {hero}'s {kin} asked, \"Where have you been?\" And {hero}"
         " said, \"Oh, {at spot:places}!\" and [blushed|quickly talked of something else].",
         "Once {hero}'s {kin} [nearly|almost] found them. \"Let us go to the {spot:places}!\""
         " cried {hero}, and the secret was safe."],
        ["On the last day, {pet} [ran off with|carried away] the {thing}, and they had to [chase"
         "|follow] the {beast} [three times|once] around the {spot}.",
         "On the evening before, the {thing} was [torn|dirty], for {pet} had [played with it"
         "|slept on it]. They worked until the lamps were lit."],
        ["Meanwhile they baked {k:numbers} {food:bakes.s}. The {beast} ate {m:part k}, so {k-m}"
         " were left for the party.",
         "{k:numbers.Cap} {food:bakes.s} were in the oven. {friend} [burned|dropped|tasted]"
         " {m:part k}, and that left {k-m}."],
        [""],
        ['"Happy birthday!" [shouted|cried|sang] {hero} and {friend}. They had [hung paper stars'
         '|picked flowers|lit candles] {at place}, and there lay the {colour} {thing}.',
         "After {n} days {hero} led {hero.his} {kin} to the {place}. Among [flowers|candles"
         "|paper stars] waited the {colour} {thing}."],
        ["\"And I thought you were {at spot}!\" said {hero}'s {kin}. They all laughed and ate"
         " the {k-m} {food.s}.",
         "{hero}'s {kin} [was speechless|wiped away a tear] and hugged them both. Even {pet} got"
         " a [kiss|pat|crumb]."],
        ["3*<afterwards>", "<lesson> <farewell>"],
    ],
    "a storm": [
        ["{hero} looked after the {n:numbers} {herd:herds.s} of {hero.his} {kin} {at"
         " place:pastures}, and {friend:people} often kept {hero.him} company.",
         "{hero.His} {kin} had {n:numbers} {herd:herds.s}, and {hero} took them to the"
         " {place:pastures} each morning, together with {friend:people}."],
        ['<oneday>, the sky turned [black|dark|yellow and grey]. "A storm!" said {friend}.'
         ' [Thunder rolled|Lightning flashed|The wind howled], and the {herd.s} [scattered|fled].',
         "<oneday>, [rain|hail] began to beat down, and in the [fierce|wild|terrible] wind the"
         " {herd.s} [ran away|scattered on every side]."],
        [""],
        ["{hero} and {friend} drove them to the {spot:shelters} and counted. Only {k:part n}"
         " were there!",
         '"To the {spot:shelters}!" [shouted|called] {hero}. Running and calling, they brought'
         ' {k:part n} {herd.s} to safety.'],
        ['"{n-k.Cap} are missing," said {friend} [through the noise|breathlessly|with wide'
         ' eyes]. "We must [call|guide] them," {hero} <said>.',
         '"But where are the other {n-k}?" [asked|cried] {friend}. "They cannot find us in this'
         ' [weather|rain]," {hero} <said>.'],
        ["{friend} had {a colour:colours} {thing:signals} in {friend.his} bag. [Again and again"
         "|For an hour] {friend.he} used it, and {hero} called [each of them by name|until"
         " {hero.he} was hoarse].",
         "{hero} took {hero.his} {kin}'s {colour:colours} {thing:signals} and went out into the"
         " [rain|wind] with it, and {friend} [held {hero.his} coat|stayed close behind]."],
        [""],
        ["First came one, then another, [dripping|shivering] out of the dark, until all {n}"
         " {herd.s} were [together|safe] {at spot}.",
         "And they came! {hero} counted the {n-k} that had been lost, one by one. Now there were"
         " {n} {herd.s} again."],
        ["They huddled close together {at spot} until the [thunder|rain] [stopped|moved on].",
         "In the morning the sun shone, and the {herd.s} went back to the {place}. Only the"
         " {thing} was still [wet|dripping]."],
        ["\"All {n}?\" asked {hero}'s {kin} at the door. \"All {n},\" said {hero}, \"thanks to"
         " {friend}.\"",
         "2*"],
        ["3*<ending>", "<lesson> <farewell>"],
    ],
    "too little for all": [
        ["<oneday>, the [children|whole class] went on a picnic {at place:places}. {hero} had"
         " packed {n:numbers} {food:foods.s} in {a colour:colours} {thing:vessels}.",
         "<oneday>, {hero} <walked> to the {place:places} with {a colour:colours}"
         " {thing:vessels} that held {n:numbers} {food:foods.s}."],
        ["{friend:people} came, too, with {a tint:colours} {other:bags}, but [on the way|at the"
         " bridge] it had [fallen into the water|burst open].",
         "There {hero.he} met {friend:people}, who carried {a tint:colours} {other:bags}, [quite"
         " empty|with nothing in it]."],
        ['"I am not hungry," said {friend}, but {friend.his} stomach [rumbled|growled] so loudly'
         ' that {a beast:wanderers} [looked up|came closer].',
         "{friend} [looked at the clouds|turned away], and only {a beast:wanderers} sat down"
         " beside {friend.him}."],
        [""],
        ['{hero} was very hungry, but then {hero.he} [thought of|looked at] {friend} and counted'
         ' out {k:part n}. "These are for you," {hero.he} said.',
         '{hero} [put|laid] {k:part n} {food.s} into the {tint} {other}. "[Look|See]," {hero.he}'
         ' said, "it is not empty any more."'],
        ['"Then you have only {n-k} left!" said {friend}. "{n-k.Cap} taste better than {n}, if'
         ' nobody goes hungry," {hero} <said>.',
         "{n-k.Cap} were left. {hero} gave [the smallest of them|a bite of one] to the {beast},"
         " and it [licked its lips|came back for more]."],
        [""],
        ["A week later {hero} was in trouble: {hero.he} had [forgotten|left] the {thing} {at"
         " spot:places}, and [it was getting late|night fell].",
         "Some days later, {hero} [got lost|hurt {hero.his} foot] {at spot:places} and sat there"
         " alone with the {thing}."],
        ['Who came along? {friend}, with the {beast} behind {friend.him}! "You gave me {k}'
         ' {food.s}," {friend.he} said. "Now I will help you."',
         'But {friend} had [missed|looked for] {hero.him} everywhere. "I have not forgotten the'
         ' {place}," {friend.he} said and [helped {hero.him}|took {hero.his} hand].'],
        ["And in the {tint} {other} were {m:numbers} fresh {food.s}, enough for both.", "2*"],
        ["3*<ending>", "<lesson> <farewell>"],
    ],
    "a stray": [
        ["<oneday>, {hero} heard a [whimper|rustle|faint noise] {at place:places}. There sat {a"
         " beast:companions}, [wet|thin|lonely], wearing {a colour:colours} {thing:collars}.",
         "<oneday>, {a beast:companions} followed {hero} home from the {place:places}. It wore"
         " {a colour:colours} {thing:collars} and looked [hungry|tired|lost]."],
        ['"May I keep it?" asked {hero}. "[Somebody may be looking for it|It must belong to'
         ' somebody]," said {hero.his} {kin}.',
         '{hero} made it a bed in a [drawer|box|barrel]. "It may stay until we find its people,"'
         ' said {hero.his} {kin}.'],
        ["{hero} called it {pet:pets}. For {n:numbers} days they were [never apart|always"
         " together], and every day {pet} ate {k:numbers} {food:foods.s}.",
         "{hero} named it {pet:pets}. Every day it ate {k:numbers} {food:foods.s}, and after"
         " {n:numbers} days it was [round and merry|strong again]."],
        [""],
        ['Then {hero} asked the {job:jobs}. "I have seen [a notice|a child calling and calling]'
         ' {at spot:corners}," was the answer.',
         'Then the {job:jobs} [came by|knocked] and said, "A child {at spot:corners} is [crying'
         ' over|looking for] a lost {beast}."'],
        ["It was hard, but {hero} took {pet} in {hero.his} arms and [walked|went|trudged] to the"
         " {spot}.",
         '"I could [say nothing|keep quiet]," thought {hero}. But {hero.he} [looked at|stroked]'
         ' {pet} and [walked|went|set out] to the {spot}.'],
        [""],
        ['A [girl named {friend:girls}|boy named {friend:boys}] came running. "That is my'
         ' {beast}! I know the {colour} {thing}!" {friend.he} [cried|sobbed|cheered].',
         "There {friend:people} sat and [wept|stared at the road]. Then {friend.he} saw the"
         " {colour} {thing}, and soon the {beast} was in {friend.his} arms."],
        ['"You fed it for {n} days?" asked {friend}. "Yes, with {k} {food.s} a day," {hero}'
         ' <said>.',
         '"I call it {pet}," said {hero}. "Then that is its name," said {friend}. "After {n}'
         ' days with you it is half yours."'],
        ['"Come and [visit|see] us," said {friend}, and {pet} [agreed|seemed to agree].',
         "So {hero} had lost {a beast} and [won|found] a friend."],
        ["3*<ending>", "<lesson> <farewell>"],
    ],
    "a rainy day": [
        ["One [wet|rainy|stormy] <weekday>, {friend:people} came to play. {hero} [knew new"
         " riddles|had riddles for {friend.him}].",
         "It rained all <weekday>. {hero} and {friend:people} [sat by the stove|sat under the"
         " table] and [asked|told] each other riddles."],
        [""],
        ['"<riddle>"'],
        ['"Right!" said {hero}.', "{friend} <warm>.", "2*"],
        ['"<riddle>"'],
        [""],
        ['Then they played a memory game. "<<pack>>"',
         'Then each repeated what the other had said and added a little. "<<pack>>"'],
        ["<close>"],
    ],
    "a cold": [
        ["<oneday>, {friend:people} lay in bed with a cold, and {hero} [asked|told] {friend.him}"
         " riddles.",
         "<oneday>, {hero} had a cold, and {friend:people} [asked|told] {hero.him} riddles."],
        [""],
        ['"<riddle>"'],
        ['"Right!"', "2*"],
        ['"<riddle>"'],
        [""],
        ['[And one more|And a last one]: "<riddle>"'],
        ["<close>"],
    ],
    "pencil and paper": [
        ["One evening {hero} and {friend:people} sat at the table with pencil and paper, and each"
         " [gave the other a task|told the other what to write].",
         '{friend:people} had [brought|found] a new pencil. "Now we are writers," {hero} [said'
         '|decided].'],
        [""],
        ['"<<write>>"'],
        ["{friend} <warm>.", '"Well done!" said {hero.his} {kin}.', "2*"],
        ['"<<write>>"'],
        [""],
        ['Then {friend} put the pencil away. "<riddle>"',
         '"I know a riddle," said {friend}. "<riddle>"'],
        ["<close>"],
    ],
    "a long way": [
        ["<oneday>, {hero} and {friend:people} had a long way to go, and so they played [memory"
         " games|games with words]."],
        [""],
        ['"<<pack>>"'],
        ["{friend} <warm>.", "2*"],
        ['"<riddle>"'],
        [""],
        ['"<riddle>"'],
        ["<close>"],
    ],
}

# Tasks: a passage, a question and its answer; then a second question and answer, told only within
# stories. Each passage names several people, places or numbers, and several questions can be asked
# of it, so that the answer does not always stand at the same point. "write" asks for a story, and
# "what_next" how such a story goes on.
TASKS = {
    "who": [
        "{hero:people} lost {a thing:toys} {at place:places}. {friend:people} looked for it {at"
        " spot:places}, but it was {rival:people} who found it. Who [lost the {thing}? => {hero}."
        " => And who found it? => {rival}|found the {thing}? => {rival}. => And who looked for"
        " it? => {friend}|looked for the {thing}? => {friend}. => And who lost it? => {hero}].",
        "{friend:people} made {a thing:gifts}. {hero:people} bought it for a birthday, and"
        " {rival:people} wrapped it in paper. Who [made the {thing}? => {friend}. => And who"
        " bought it? => {hero}|bought the {thing}? => {hero}. => And who wrapped it? =>"
        " {rival}|wrapped the {thing}? => {rival}. => And who made it? => {friend}].",
        "{hero:people} wanted the {thing:toys}, but {rival:people} gave it to {friend:people}."
        " Who [wanted the {thing}? => {hero}. => And who gave it away? => {rival}|got the"
        " {thing}? => {friend}. => And who wanted it? => {hero}|gave the {thing} away? =>"
        " {rival}. => And who got it? => {friend}].",
    ],
    "where": [
        "{hero:people} left {a thing:toys} {at place:places}. {friend:people} hid {a other:toys}"
        " {at spot:places}. Then they met {at end:places}. Where did [{~hero} leave the {thing}?"
        " => {At place}. => And where did {friend} hide the {other}? => {At spot}|{~friend} hide"
        " the {other}? => {At spot}. => And where did they meet? => {At end}|they meet? => {At"
        " end}. => And where did {hero} leave the {thing}? => {At place}].",
        "{friend:people} waited {at spot:places}, but {hero:people} played with {a thing:toys}"
        " {at place:places}. In the evening they met {at end:places}. Where did [{~friend} wait?"
        " => {At spot}. => And where did {hero} play? => {At place}|{~hero} play? => {At place}."
        " => And where did they meet? => {At end}|they meet? => {At end}. => And where did"
        " {friend} wait? => {At spot}].",
    ],
    "how_many": [
        "{hero:people} brought {n:many} {food:foods.s} in {a thing:vessels}, and {friend:people}"
        " gave {hero.him} {m:many} coins for them. How many [{~food.s} did {hero} bring? =>"
        " {n.Cap}. => And how many coins did {friend} give? => {m.Cap}|coins did {friend} give? =>"
        " {m.Cap}. => And how many {food.s} did {hero} bring? => {n.Cap}].",
        "{hero:people} had {n:numbers} {food:foods.s} in {a thing:vessels} and gave"
        " {friend:people} {k:part n} of them. How many {food.s} [did {~friend} get? => {k.Cap}."
        " => And how many were left? => {n-k.Cap}|did {~hero} have at first? => {n.Cap}. => And"
        " how many did {friend} get? => {k.Cap}|were left in the {thing}? => {n-k.Cap}. => And"
        " how many did {hero} have at first? => {n.Cap}].",
        "{hero:people} put {n:numbers} {food:foods.s} into {a thing:vessels}, and {friend:people}"
        " added {m:few}. How many {food.s} [did {~hero} put into the {thing}? => {n.Cap}. => And"
        " how many did {friend} add? => {m.Cap}|did {~friend} add? => {m.Cap}. => And how many did"
        " {hero} put into the {thing}? => {n.Cap}|2*were in the {thing} then? => {n+m.Cap}. => And"
        " how many did {friend} add? => {m.Cap}].",
    ],
    "write": [
        "[Write|Tell me|Make up|Invent|Please write] a short story [about|with] {hero:people},"
        " {friend:people} and {a colour:colours} {thing:toys}. => <tale>",
    ],
}

# fmt: on

GRAMMAR = Grammar(LISTS, PHRASES | TASKS)
STORY = pick([[GRAMMAR.plot([["<opening>"], *steps])] for steps in PLOTS.values()])
QUESTIONS = {kind: pick([[GRAMMAR.template(t)] for t in ways]) for kind, ways in TASKS.items()}
FACT_KINDS = tuple(GRAMMAR.patterns)  # what stories recall: name, object, place, ...


def tell(seed: int) -> Derivation:
    """The story of a seed (0 or more). Raises ValueError if the seed is negative."""
    if seed < 0:
        raise ValueError(f"seed = {seed} must not be negative")
    return GRAMMAR.sample(STORY, random.Random(seed))


def parse(text: str) -> Derivation:
    """The story that reads so. Raises ParseError if there is none."""
    return GRAMMAR.parse(text, STORY)


def tag_facts(ids: np.ndarray, tokenizer: Tokenizer) -> tuple[float, np.ndarray]:
    """Of one story's tokens [n], bos and eos included: -log of its probability in nats, and for
    each token 0, or 1 + the place in FACT_KINDS of the fact that it recalls."""
    story = parse(tokenizer.decode(ids.tolist()))
    tags = np.zeros(len(ids), np.int64)
    for i, (start, end) in enumerate(tokenizer.encode(story.text).offsets, start=1):
        for a, b, kind in story.facts:
            if start < b and a < end:
                tags[i] = 1 + FACT_KINDS.index(kind)
    return story.nats, tags


# ----------------------------------------------------------------------------------------------
# Instructions with answers that can be checked
# ----------------------------------------------------------------------------------------------

KINDS = (*TASKS, "what_next")
NEGATION = re.compile(r"\b(not|no|never|nobody|neither|nor)\b|n't\b")


@dataclass(frozen=True)
class Task:
    """An instruction, one right answer, and what the judge needs to find others."""

    kind: str  # one of KINDS
    instruction: str
    answer: str
    # hero and thing; for questions "right" and its "kind"; for what_next the story "so_far"
    facts: dict[str, str]


def instructions(seed: int, held_out: bool = False) -> Iterator[Task]:
    """Endlessly many tasks: of all kinds alike, but numbers, the hardest to learn, twice as often.

    One pair of a person and a thing in ten is kept apart: the hero and the thing of a task with
    held_out are always such a pair, and without held_out no such pair is ever in one text.
    Raises ValueError if the seed is negative.
    """
    if seed < 0:
        raise ValueError(f"seed = {seed} must not be negative")
    return _instructions(random.Random(seed), held_out)


def _instructions(rng: random.Random, held_out: bool) -> Iterator[Task]:
    drawn = (*KINDS, "how_many")
    while True:
        kind = drawn[int(rng.random() * len(drawn))]
        while True:
            whole = GRAMMAR.sample(QUESTIONS["write" if kind == "what_next" else kind], rng)
            roles = whole.roles
            people, things = (
                [m.index for m in roles.values() if m.kind == sort] for sort in ("name", "object")
            )
            kept_apart = [(person + thing) % 10 == 0 for person in people for thing in things]
            hero_and_thing = (roles["hero"].index + roles["thing"].index) % 10 == 0
            if (held_out and hero_and_thing) or not (held_out or any(kept_apart)):
                break
        instruction, answer, *_ = whole.text.split(" => ")
        facts = {role: str(roles[role]) for role in ("hero", "thing")}
        if kind == "what_next":
            sentences = re.split(r"(?<=[.]) ", answer)
            at = 1 + int(rng.random() * (len(sentences) - 1))
            so_far, answer = " ".join(sentences[:at]), sentences[at]
            facts["so_far"] = f"{instruction} => {so_far} "
            about = re.split(" about | with ", instruction)[1].rstrip(".")
            instruction = f"What happens next in this story about {about}? {so_far}"
        elif kind != "write":  # what is right is the last fact of the answer
            end = len(f"{instruction} => {answer}")
            start, end, what = [fact for fact in whole.facts if fact[1] <= end][-1]
            facts |= {"right": whole.text[start:end].lower(), "kind": what}
            if what == "number":
                # No story has a number with a capital behind a space. It would be made of tokens
                # that a model has never said, and LoRA does not train the output head.
                answer = f"It was {answer.lower()}"
        yield Task(kind, instruction, answer, facts)


def is_right(task: Task, answer: str) -> bool:
    """Whether an answer is right, in whatever words.

    A story must be one of this world's, about those who were asked for, and what happens next
    one sentence or more with which it goes on. Other answers name what was asked for and nothing
    else of its kind, in one sentence that denies nothing; numbers may be digits.
    """
    if task.kind in ("write", "what_next"):
        before = task.facts.get("so_far", f"{task.instruction} => ")
        answer = answer.strip()
        try:
            GRAMMAR.parse(before + answer, QUESTIONS["write"])
        except ParseError as error:
            # what happens next need not be the end
            return task.kind == "what_next" and error.kind == "end" and answer.endswith(".")
        return True
    answer = answer.lower()
    if len(answer.split()) > 25 or NEGATION.search(answer):
        return False
    if task.facts["kind"] == "number":
        counted = {str(m.index): str(m) for m in GRAMMAR.lists["count"]}
        answer = re.sub(r"-?\b\d+\b", lambda m: counted.get(m[0], "zero"), answer)
    words = GRAMMAR.patterns[task.facts["kind"]].pattern.lower()
    named = re.findall(rf"\b(?:{words})\b(?!'s)", answer)
    return set(named) == {task.facts["right"]}
