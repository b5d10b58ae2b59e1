"""Word lists of the bundled tasks: common English words, written down here for this project."""

from __future__ import annotations

# Pairs of opposites.
OPPOSITES = """
hot cold, big small, tall short, fast slow, young old, rich poor, light dark, heavy weightless,
happy sad, hard soft, wet dry, open closed, early late, strong weak, full empty, thick thin,
wide narrow, deep shallow, loud quiet, clean dirty, safe dangerous, brave cowardly, polite rude,
cheap expensive, simple complex, true false, rough smooth, sharp blunt, sweet bitter, near far,
above below, inside outside, before after, always never, buy sell, push pull, win lose,
give take, begin end, arrive depart, rise fall, love hate, laugh cry, remember forget,
accept refuse, attack defend, build destroy, increase decrease, export import, lend borrow,
teach learn, float sink, freeze melt, lock unlock, appear vanish, ask answer, friend enemy,
day night, summer winter, north south, east west, left right, top bottom, entrance exit,
victory defeat, question reply, peace war, birth death, hero villain, ancestor descendant,
ceiling floor, profit loss, success failure, guilty innocent, generous greedy, modern ancient
"""

# Nouns with a plural that a rule does not give, or gives only with care.
PLURALS = """
man men, woman women, child children, foot feet, tooth teeth, goose geese, mouse mice, louse lice,
ox oxen, person people, knife knives, wife wives, life lives, leaf leaves, loaf loaves, wolf wolves,
half halves, shelf shelves, thief thieves, calf calves, scarf scarves, elf elves, city cities,
baby babies, lady ladies, story stories, party parties, country countries, family families,
berry berries, cherry cherries, puppy puppies, pony ponies, daisy daisies, fairy fairies,
army armies, diary diaries, factory factories, library libraries, memory memories, box boxes,
fox foxes, tax taxes, bus buses, glass glasses, class classes, dress dresses, kiss kisses,
boss bosses, match matches, watch watches, bench benches, church churches, peach peaches,
beach beaches, witch witches, brush brushes, dish dishes, wish wishes, bush bushes, potato potatoes,
tomato tomatoes, hero heroes, echo echoes, torpedo torpedoes, piano pianos, photo photos,
radio radios, video videos, zoo zoos, day days, key keys, toy toys, boy boys, donkey donkeys,
monkey monkeys, valley valleys, chimney chimneys, turkey turkeys, roof roofs, chief chiefs,
cliff cliffs, belief beliefs, cat cats, dog dogs, house houses, horse horses, rose roses,
bridge bridges, cage cages, page pages, judge judges, crisis crises, thesis theses, oasis oases,
analysis analyses, basis bases, cactus cacti, fungus fungi, nucleus nuclei, stimulus stimuli,
criterion criteria, phenomenon phenomena, sheep sheep, deer deer, fish fish, moose moose,
salmon salmon, aircraft aircraft, species species, table tables, river rivers, garden gardens,
window windows, teacher teachers, doctor doctors, lamp lamps, ship ships, road roads, coat coats
"""

# Verbs and their simple past.
PASTS = """
go went, come came, see saw, eat ate, drink drank, sing sang, swim swam, begin began, ring rang,
run ran, sit sat, stand stood, understand understood, take took, shake shook, give gave, make made,
know knew, grow grew, throw threw, blow blew, fly flew, draw drew, write wrote, ride rode,
drive drove, rise rose, choose chose, freeze froze, speak spoke, break broke, steal stole,
wake woke, wear wore, tear tore, bear bore, swear swore, get got, forget forgot, sell sold,
tell told, hold held, find found, bind bound, wind wound, grind ground, bring brought,
buy bought, think thought, fight fought, seek sought, catch caught, teach taught, leave left,
feel felt, keep kept, sleep slept, sweep swept, weep wept, meet met, feed fed, lead led, bleed bled,
breed bred, read read, say said, pay paid, lay laid, hear heard, lose lost, shoot shot, win won,
spin spun, dig dug, hang hung, stick stuck, strike struck, sting stung, swing swung, build built,
bend bent, lend lent, send sent, spend spent, mean meant, deal dealt, dream dreamed, burn burned,
learn learned, cut cut, put put, shut shut, hit hit, let let, set set, cost cost, hurt hurt,
burst burst, cast cast, split split, spread spread, fall fell, do did, have had, become became,
bite bit, hide hid, slide slid, light lit, shine shone, walk walked, talk talked, jump jumped,
stop stopped, plan planned, drop dropped, carry carried, hurry hurried, study studied,
try tried, cry cried, play played, enjoy enjoyed, love loved, bake baked, dance danced
"""

# Adjectives with comparative and superlative.
GRADES = """
big bigger biggest, small smaller smallest, tall taller tallest, short shorter shortest,
fast faster fastest, slow slower slowest, old older oldest, young younger youngest,
good better best, bad worse worst, far farther farthest, little less least, many more most,
happy happier happiest, sad sadder saddest, hot hotter hottest, cold colder coldest,
warm warmer warmest, cool cooler coolest, wet wetter wettest, dry drier driest,
easy easier easiest, hard harder hardest, heavy heavier heaviest, light lighter lightest,
dark darker darkest, bright brighter brightest, loud louder loudest, quiet quieter quietest,
early earlier earliest, late later latest, long longer longest, wide wider widest,
narrow narrower narrowest, deep deeper deepest, high higher highest, low lower lowest,
rich richer richest, poor poorer poorest, cheap cheaper cheapest, clean cleaner cleanest,
dirty dirtier dirtiest, strong stronger strongest, weak weaker weakest, kind kinder kindest,
brave braver bravest, wise wiser wisest, smart smarter smartest, fat fatter fattest,
thin thinner thinnest, thick thicker thickest, large larger largest, nice nicer nicest,
safe safer safest, close closer closest, pretty prettier prettiest, funny funnier funniest,
busy busier busiest, lucky luckier luckiest, angry angrier angriest, hungry hungrier hungriest,
soft softer softest, sharp sharper sharpest, rough rougher roughest, smooth smoother smoothest
"""

# Members of some categories; the bundled tasks also draw their plain words from here.
CATEGORIES = {
    "animal": "tiger horse rabbit eagle salmon lizard donkey spider otter camel beaver dolphin "
    "parrot turtle badger weasel hamster gorilla penguin leopard",
    "fruit": "apple banana cherry orange lemon grape mango peach plum apricot papaya melon fig "
    "raspberry blueberry pineapple kiwi pear quince strawberry",
    "tool": "hammer saw wrench drill chisel pliers screwdriver axe shovel rake file crowbar level "
    "trowel sickle anvil mallet spade clamp hoe",
    "vehicle": "car truck bicycle train tram ferry airplane helicopter scooter motorcycle canoe "
    "submarine tractor bus van taxi yacht rocket sled wagon",
    "clothing": "shirt jacket trousers skirt sock glove hat scarf sweater dress coat belt boot "
    "sandal vest blouse tie apron cap mitten",
    "instrument": "piano violin trumpet flute guitar drum cello harp clarinet trombone oboe banjo "
    "accordion tuba organ mandolin saxophone viola bassoon xylophone",
    "furniture": "chair table sofa bed desk wardrobe shelf stool bench cupboard dresser armchair "
    "bookcase cradle nightstand couch cabinet ottoman bunk crib",
    "profession": "baker doctor farmer lawyer nurse plumber teacher carpenter pilot tailor "
    "butcher dentist engineer fisherman gardener painter cook judge miner sailor",
}

PEOPLE = (
    "Ada Ben Clara David Emma Felix Grace Henry Irene Jack Karen Leo Maria Noah Olga Paul Quinn "
    "Rosa Simon Tina Victor Wanda Yusuf Zoe"
)
SURNAMES = (
    "Adler Brook Carter Dale Ellis Foster Grant Hale Irving Jensen Keller Lang Moore Norton Ortega "
    "Price Quill Reed Stone Turner Vance Walker Young"
)
THINGS = "apples books coins marbles stamps eggs pencils shells"
ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
)
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
MONTHS = "January February March April May June July August September October November December"

# Sentences about a thing, by the feeling they express; {} is the thing.
PRAISE = """
The {} was wonderful from start to finish.|I enjoyed every minute of this {}.
What a delightful {}, I would choose it again.|This {} is better than I had hoped.
My whole family loved the {}.|A charming {} that made my day.|I can only recommend this {}.
The {} exceeded all my expectations.|Such a pleasant {}, simply excellent.
I am very happy with the {}.|The {} was a joy and worth every penny.
"""
BLAME = """
The {} was dreadful from start to finish.|I regretted every minute of this {}.
What a disappointing {}, never again.|This {} is worse than I had feared.
My whole family hated the {}.|A boring {} that spoiled my day.|I must warn everyone of this {}.
The {} fell short of all my expectations.|Such an unpleasant {}, simply awful.
I am very unhappy with the {}.|The {} was a waste and not worth a penny.
"""
REVIEWED = (
    "film book meal hotel concert game lesson holiday phone tour play restaurant museum song show"
)

# Sentences by what they are about; {} is a person.
TOPICS = {
    "sports": "{} scored twice before half-time.|{} ran the marathon in three hours.|{} trains "
    "with the team on Mondays.|The referee showed {} a red card.|{} won at tennis in two sets.",
    "cooking": "{} chops the onions for the soup.|{} lets the dough rest for an hour.|{} added too "
    "much salt to the stew.|The cake that {} baked needs more sugar.|{} fries the eggs in butter.",
    "weather": "{} forgot the umbrella and it poured.|The storm kept {} awake all night.|{} hopes "
    "for sunshine at the weekend.|Fog hid the road from {}.|{} shovels the fresh snow away.",
    "money": "{} opened a savings account.|{} cannot pay the rent this month.|The bank offered {} "
    "a loan.|{} sold the shares at a profit.|{} asked for a higher salary.",
    "music": "{} practises the violin every evening.|{} sings the alto part in the choir.|The band "
    "asked {} to play the drums.|{} wrote a song for the wedding.|{} tunes the piano by ear.",
    "travel": "{} missed the connecting flight.|{} packed two suitcases for the journey.|The visa "
    "of {} arrived in time.|{} booked a cabin on the ferry.|{} crossed the border on foot.",
}


def pairs(text: str) -> list[tuple[str, ...]]:
    """The groups of words in a list whose groups are separated by commas."""
    return [tuple(group.split()) for group in text.split(",")]


def sentences(text: str) -> list[str]:
    """The sentences in a list that separates them by ``|`` or line breaks."""
    return [part.strip() for line in text.strip().splitlines() for part in line.split("|") if part]
