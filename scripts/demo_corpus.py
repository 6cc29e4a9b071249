"""The demo model's text: seeded stories, sums, sorting, copying, recall and chat, with held-out items.

Everything is made here from small word lists; nothing is downloaded. A document is a list of segments
`(text, learn)`: `learn` marks what the model should produce (an answer, a story), the rest is given. Special
tokens are segments of their own.

The split: every scored item has a key that says what is asked, whatever the wording around it, and
`held_out(kind, key)` hashes it. Training documents reject held-out keys and held-out items reject the others,
so that no held-out item occurs in training by construction. Tables too small to generalise over (single-digit
products) are trained whole and never scored.
"""
from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterator
from functools import partial

BOS, EOS, HEADER, END_HEADER, EOT = SPECIAL_TOKENS = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
SCORED_KINDS = ("sums", "sorting", "copying", "recall", "qa")
HELD_OUT_SHARE = 8                              # one key in eight is never trained on

Document = list[tuple[str, bool]]
Messages = list[dict[str, str]]
Exchange = tuple[str, str]                      # what the user says, what the assistant answers


def held_out(kind: str, key: str) -> bool:
    """Whether the item `key` of `kind` is kept out of training."""
    return hashlib.blake2b(f"{kind}:{key}".encode(), digest_size=1).digest()[0] % HELD_OUT_SHARE == 0


def draw(rng: random.Random, kind: str, held: bool, make: Callable[[random.Random], tuple]) -> tuple:
    """Call `make(rng) -> (key, *rest)` until the key is on the wanted side of the split; return `rest`."""
    while True:
        key, *rest = make(rng)
        if held_out(kind, key) == held:
            return tuple(rest)


# ------------------------------------------------------------------------------------------------- word lists

GIRLS = """Mira Anna Lily Nora Ella Rosa Clara Ida Maya Zoe Lena Tess Ruby Alma Vera Iris Nell Jade Faye Wren
Hazel Greta Dora Lucy Mona Olive Petra Sara Tilda Una""".split()
BOYS = """Tom Ben Max Leo Sam Finn Jack Hugo Emil Noah Otto Paul Theo Adam Karl Oscar Felix Simon Ned Luke
Arlo Boris Casper Daniel Edgar Frank Gus Henry Ivan Jonas""".split()
NAMES = GIRLS + BOYS
ANIMALS = """fox rabbit bear mouse hedgehog squirrel otter badger frog owl duck goat cat dog turtle deer wolf
beaver crow hen""".split()
JOBS = "baker miller sailor gardener tailor painter shepherd potter carpenter farmer".split()
HEROES = "dragon robot king prince knight wizard giant lion elephant monkey penguin tiger pirate".split()
HEROINES = "queen princess witch fairy".split()
TRAITS = """small young brave quiet cheerful curious clever shy kind old patient gentle careful lively honest
friendly""".split()
MOODS = "brave quiet cheerful curious kind patient gentle careful lively honest friendly".split()
OBJECTS = """key lantern kite drum ball basket bell book ring hat scarf map clock flute coin button mirror
whistle rope ladder cup spoon blanket letter""".split()
COLOURS = "red blue green yellow white black brown orange purple pink silver golden".split()
FOODS = """apples bread honey berries soup cake nuts pears cheese plums carrots corn cherries rice beans
mushrooms""".split()
PLACES = {at.split()[-1]: at for at in (
    "in the forest", "by the river", "on the hill", "in the village", "at the harbour", "in the meadow",
    "near the market", "beside the mill", "by the lake", "in the garden", "below the mountain",
    "near the beach", "near the bridge", "in the valley", "on the island", "behind the castle",
    "beside the orchard", "near the cave", "under the tower", "by the field")}
WORDS = sorted({*ANIMALS, *JOBS, *TRAITS, *OBJECTS, *COLOURS, *FOODS, *PLACES, *"""apron acorn anchor bench
branch bucket butter candle carpet chair cloud corner desk door dust eagle engine feather fence flag flower
glass glove gold grape hammer hand heart horn house ice iron island jar jelly kettle kitchen knee lamp leaf
lemon lion machine metal milk moon morning nail needle nest night ocean onion oven paper path pencil pillow
pocket queen quilt rain road roof root sand school seed shadow shelf shoe snow sock song spider star stone
storm street sugar summer table tiger town train tree tunnel uncle valley violin wagon wall water wheel window
winter wood yard zebra""".split()})


# ---------------------------------------------------------------------------------------------------- stories
# A plot is a list of beats, each a choice of sentences that carry the same event, so that any choice keeps
# the causes and effects of the story. {H} and {F} are hero and friend, {he} {him} {his} and {fhe} {fhim}
# {fhis} their pronouns; "a" becomes "an" where it has to.

OPENINGS = (
    "Once upon a time, there was a {trait} {kind} named {H} who lived {at}.",
    "Once upon a time, a {trait} {kind} named {H} lived in a little house {at}.",
    "Long ago, a {trait} {kind} named {H} lived {at}.",
    "There was once a {kind} named {H}. {He} was {trait} and {trait2}, and {he} lived {at}.",
    "In a little house {at} lived a {trait} {kind} named {H}.",
    "{H} was a {trait} {kind} who lived {at}.",
    "A {kind} named {H} lived {at}. Everyone knew that {he} was very {trait}.")

DETAILS = (
    "{He} had a friend named {F}, a {ftrait} {fkind}, and the two of them met every day.",
    "{His} best friend was {F}, a {fkind} who was always {mood}.",
    "Next door lived {F}, a {ftrait} {fkind}, who liked to eat {food}.",
    "Every evening {he} ate {food} with {his} friend {F}, a {ftrait} {fkind}.",
    "Of all {his} friends, {he} liked {F} the {fkind} best.")

_PLOTS = """
# lost
- More than anything else, {H} loved {his} {col} {obj}. | {H} had a {col} {obj} that {his} grandmother had
  given {him}. | The thing {H} liked best was {his} {col} {obj}.
- One morning the {obj} was gone. | One day {he} looked for the {obj}, but it was not there. | But one
  {weather} day {he} could not find the {obj} anywhere.
- {H} looked under the bed and behind the door, but it was not there. | {He} searched the whole house and
  found nothing. | {He} looked in every corner and began to feel sad.
- Then {F} came by and asked what was wrong. | "Why do you look so sad?" asked {F}. | When {F} heard about it,
  {fhe} came at once to help.
- "Where did you have it last?" asked {F}. {H} thought for a while. "{At2}," {he} said. | {F} said, "Let us go
  back the way you came." So they walked back and looked {at2}. | Together they walked to the {place2},
  because {H} had been there the day before.
- There, in the tall grass, something {col} was shining. It was the {obj}! | And there it was: the {col} {obj}
  lay under a leaf, a little wet but not broken. | {F} saw it first. The {obj} was hanging from a branch.
- {H} was so happy that {he} laughed out loud. "Thank you, {F}," {he} said. | "Thank you," said {H}, and {he}
  gave {F} a big hug. | {H} thanked {F} and shared some {food} with {fhim}.
- From that day on, {he} always put the {obj} back in its place. | After that, {H} took better care of {his}
  things. | That night the {obj} stood beside {his} bed, and {H} slept well.
# rescue
- One day {H} was walking {at2} when {he} heard a small voice. | One {weather} morning {H} went for a walk
  {at2} and heard someone cry for help. | On the way home {he} heard a cry {at2}.
- It was {F}, a {ftrait} {fkind}, who had fallen into a deep hole. | A {fkind} named {F} was caught in the
  thorns and could not move. | A {ftrait} {fkind} named {F} was stuck between two stones.
- "Do not be afraid," said {H}. "I will help you." | {H} did not run away. "Hold still," {he} said, "and I
  will get you out." | "Please help me," said {F}. "I have been here all night."
- {He} found a long rope, tied it to a tree, and pulled with all {his} strength. | {He} looked around, found a
  strong branch, and pushed it under the stone. | It was hard work, but {H} pulled and pulled until {F} was
  free.
- At last {F} was free. "I will never forget this," {fhe} said. | Soon {F} stood beside {him}, tired but safe.
  | "Thank you," said {F}. "One day I will help you too."
- Not long after that, {H} lost {his} way in the fog. | A week later, {H} was caught in a great storm. | When
  winter came, {H} had nothing left to eat.
- Who came to help? It was {F}, who brought {him} home and gave {him} warm {food}. | But {F} had not
  forgotten. {Fhe} came with a lantern and a bowl of {food}. | Then {F} knocked at the door with a basket full
  of {food}.
- So a good deed came back to the one who did it. | From then on, {H} and {F} were friends for life. | "Now we
  are even," said {F}, and they both laughed.
# storm
- One evening dark clouds came over the {place}. | One night a strong wind began to blow {at}. | That autumn
  it rained for seven days and seven nights {at}.
- {H} saw that the water in the river was rising fast. | {H} looked out of the window and saw that the old
  bridge was shaking. | The water rose higher and higher, and {H} knew that there was danger.
- {He} took {his} {col} {obj} and ran from house to house. "Wake up!" {he} called. | "We must warn the
  others," {he} said to {F}, and they ran from door to door. | So {he} ran to {F} and said, "We have to wake
  everyone."
- At first nobody believed {him}. | Some people did not want to leave their beds. | The old miller only shook
  his head and closed the door.
- But {F} believed {him} and rang the big bell. | But {F} said, "{H} never lies. We should go." | Then {F}
  pointed at the water, and everyone could see it.
- Quickly they all climbed the hill with their children and their animals. | They carried bread and blankets
  up the hill and waited there together. | One after another they followed {H} to the high ground.
- In the morning the water had gone, and nobody was hurt. | When the sun came up, the storm was over and all
  of them were safe. | The next day they saw that the bridge was gone, but every one of them was safe.
- The people thanked {H} and {F} and cooked a great pot of {food}. | "You saved us," they said to {H}, and
  {he} was proud. | Then they built a new bridge, stronger than the old one.
# winter
- All summer long {H} gathered {food} for the winter. | In the autumn {H} filled {his} kitchen with {food}. |
  {H} worked hard and put away {food} for the cold days.
- {F} the {fkind} only sang and slept in the sun. | {F} the {fkind} did not gather anything at all. | But {F},
  a {ftrait} {fkind}, forgot to get ready.
- "Winter is far away," {fhe} said. | "There is still plenty of time," said {F}. | "You should get ready too,"
  said {H}, but {F} only laughed.
- Then the snow came, and the {place} turned white and silent. | Soon the first snow fell, and the ground was
  hard as stone. | One night the cold wind came, and in the morning everything was white.
- {F} had nothing to eat, and {fhe} was ashamed to ask. | {F} was cold and hungry. At last {fhe} knocked at
  the door of {H}. | With empty hands, {F} stood at the door and did not know what to say.
- {H} opened the door. "Come in," {he} said. "There is enough for two." | "I could say that I told you so,"
  said {H}, "but I would rather say: come in." | {H} looked at {his} {food} and thought. Then {he} smiled and
  let {F} in.
- All winter they sat by the fire, and {F} sang the most beautiful songs. | They shared the {food} until
  spring, and {F} told a story every night. | The winter was long, but it was not lonely any more.
- When the next summer came, {F} was the first to gather {food}. | The next year they worked side by side. |
  And when spring came, {F} helped {H} to plant the garden.
# fear
- There was one thing {H} was afraid of: the dark cave behind the {place2}. | {H} was afraid of the dark,
  though {he} told nobody. | {H} had never dared to cross the old bridge near the {place2}.
- One evening {F} did not come home. | One {weather} afternoon {F} went out alone and did not return. | One
  day {F} went to look for {food} and did not come back.
- {H} waited and waited. It was getting dark. | The sun went down, and still there was no sign of {F}. |
  "Something must have happened," thought {H}.
- {His} knees were shaking, but {he} took a lantern and went out. | {He} was afraid, but {he} was even more
  worried about {his} friend. So {he} went. | {He} took a deep breath, lit a lantern, and walked into the
  night.
- "{F}!" {he} called. "Where are you?" | Step by step {he} went on, and {he} counted {his} steps to be brave.
  | Every shadow looked like a monster, but {H} did not turn back.
- At last {he} heard an answer. {F} had hurt {fhis} foot and could not walk. | Then {he} found {F}, who had
  lost {fhis} way and was sitting on a stone. | Deep in the dark sat {F}, cold and tired. "You came!" {fhe}
  said.
- {H} held {his} lantern high, and together they walked home. | {H} took {F} by the hand and led {fhim} home.
  | Slowly they went back, and the little light showed them the way.
- "Were you not afraid?" asked {F}. "Yes," said {H}, "but I came anyway." | After that night {H} was not
  afraid of the dark any more. | From then on {H} knew that being brave means to go on even when you are
  afraid.
# repair
- {H} had a {col} {obj}, and {he} used it every day. | {H} owned a fine {col} {obj}. | On {his} birthday {H}
  got a new {col} {obj}.
- But one day it fell to the ground and broke. | One {weather} day {he} dropped it, and it broke in two. |
  Then {F} sat down on it by mistake, and it broke.
- "Now it is ruined," said {H}, and {he} wanted to throw it away. | {H} was angry at first and did not want to
  talk. | {H} looked at the pieces and began to cry.
- "Wait," said {F}. "Maybe we can mend it." | "Do not throw it away," said {F}. "Things can be mended." | But
  {F} picked up the pieces one by one. "Let me try," {fhe} said.
- They asked the old carpenter for some glue and a bit of string. | They sat down at the table with glue, wood
  and a small hammer. | They walked to the {place2}, where an old potter showed them what to do.
- First it fell apart again. They tried once more, slowly and with care. | It took them the whole day, and
  they had to start again twice. | {F} held the pieces while {H} tied them together.
- In the evening the {obj} was whole again. You could see where it had been broken. | At last it was done. The
  {obj} did not look new, but it worked. | When they were finished, the {obj} was even stronger than before.
- "I like it better now," said {H}, "because we made it together." | {H} kept the {obj} for many years and
  always thought of {F}. | Since then, people bring their broken things to {H} and {F}.
# race
- Every year there was a race {at2}, and {H} wanted to win it. | One day a race was held {at2}. The prize was
  a {col} {obj}. | "This year I will win the race," said {H}.
- {He} trained every morning before breakfast. | For weeks {he} ran up the hill and down again. | {F} the
  {fkind} wanted to win too, and both of them trained hard.
- On the day of the race, the sun was shining and everyone came to watch. | Then the great day came, and the
  whole village stood beside the road. | The bell rang, and all the runners started at once.
- {H} was fast, and soon only {F} was in front of {him}. | Soon {H} and {F} were far ahead of all the others.
  | {H} ran like the wind. Only {F} could keep up with {him}.
- Suddenly {F} fell over a root and hurt {fhis} leg. | Then, near the last bend, {F} slipped and fell into the
  mud. | Just before the end {F} cried out. {Fhe} had fallen.
- {H} could see the finish. But {he} stopped and went back. | {H} thought of the prize for a moment. Then {he}
  turned around. | "I can win now," thought {H}. But {he} could not leave {F} there.
- {He} helped {F} up, and they walked to the finish side by side. | "Lean on me," said {H}, and they crossed
  the line together. | With {F} on {his} back, {H} came in last.
- They did not win the prize, but everyone cheered for them. | Somebody else got the prize, but {H} had found
  a friend. | "You are the real winner," said {F}, and {H} smiled.
# seed
- One spring day {F} gave {H} a tiny seed. | At the market {H} traded {his} {col} {obj} for a single seed. |
  One morning {H} found a strange seed {at2}.
- {H} put it into the ground and gave it water. | {He} planted it behind the house and waited. | {He} made a
  small hole, put the seed in, and covered it with earth.
- The next day nothing had happened. The day after that, nothing again. | Every day {he} looked, and every day
  there was nothing to see. | A week passed, and the ground was still bare.
- "It will never grow," said {H}. | "Maybe it is only a stone," said {F}. | {H} almost gave up.
- "Good things take time," said {F}. "Give it some more water." | But {he} gave it water every morning, even
  when it was cold. | "Be patient," said {F}, and {H} went on.
- Then, after a warm night of rain, there was a little green leaf. | One {weather} morning a small green point
  came out of the ground. | At last the earth broke open, and a tiny plant looked out.
- It grew and grew until it was taller than the house. | By summer it was a strong young tree. | Soon it was
  as tall as {H}, and birds came to sit in it.
- In the autumn {H} and {F} sat in its shade and ate {food}. | And {H} gave a seed of it to everyone in the
  village. | "I am glad that I waited," said {H}.
# light
- One night {H} woke up and saw a strange light {at2}. | One evening a soft sound came from the {place2}. |
  For three nights {H} had seen a small light moving {at2}.
- "Is it a ghost?" {he} thought. | {H} did not know what it could be. | {He} wanted to sleep, but {he} could
  not stop thinking about it.
- {He} woke up {F}, and they went to look together. | "Let us find out," said {F}, and they went on tiptoe. |
  So {he} put on {his} coat and went out with {F}.
- The grass was wet and the moon was hidden behind a cloud. | They walked very slowly and did not say a word.
  | It was so quiet that they could hear their own hearts.
- Behind a big stone they found an old {kind2} with a {col} {obj}. | There sat a little {kind2} who was
  holding a {col} {obj}. | What they saw was no ghost. It was a {kind2} with a lamp and a {col} {obj}.
- "I did not want to scare you," said the {kind2}. "I am looking for my way home." | "I lost my home in the
  storm," said the {kind2}. | "I come here at night," said the {kind2}, "because I have nobody to talk to."
- {H} and {F} invited the {kind2} to stay with them and cooked some {food}. | "Then come with us," said {H}.
  "We have {food} and a warm fire." | They sat down together and shared some {food}.
- Since that night there have been three friends {at}. | And the strange light was never strange again. | In
  the morning they all laughed about the ghost.
# lie
- One day {H} broke the {col} {obj} that belonged to {F}. | While {F} was away, {H} ate all of the {food}. |
  {H} borrowed the {col} {obj} of {F} and lost it {at2}.
- "Was it you?" asked {F}. "No," said {H}, and {his} face turned red. | When {F} asked about it, {H} said that
  the wind had done it. | {H} was afraid to tell the truth. "It was a stranger," {he} said.
- {F} believed {him} and said nothing more. | {F} was sad, but {fhe} believed {him}. | {F} only nodded and
  went home.
- That night {H} could not sleep. | But {H} did not feel well. {His} {food2} tasted of nothing. | The lie lay
  in {his} stomach like a stone.
- The moon looked in at the window as if it knew everything. | {He} turned from one side to the other and
  thought of {F}. | "A friend should not lie to a friend," {he} thought.
- Early in the morning {he} went to {F}. "It was me," {he} said. "I am sorry." | At sunrise {he} knocked at
  the door of {F} and told {fhim} everything. | As soon as it was light, {he} ran to {F} and told the truth.
- {F} was quiet for a while. Then {fhe} smiled. | "I am glad that you told me," said {F}. | {F} was angry for
  a moment, but then {fhe} gave {him} {fhis} hand.
- They were friends again, and {H} never lied to {fhim} again. | "The truth is heavy," said {F}, "but a lie is
  heavier." | And that day the {food2} tasted better than ever.
# letter
- One {weather} morning {H} had to bring a letter to {F}, who lived far away {at2}. | {H} had written a letter
  to {F}, a {ftrait} {fkind} who lived {at2}. | "Please take this letter to {F}," said the old miller. "The
  way is long."
- {He} packed some {food} and started early. | {He} put {food} into {his} bag and went on {his} way. | With a
  bag full of {food}, {he} left the house at sunrise.
- First {he} came to a wide river, and there was no bridge. | After an hour {he} came to a river, and the boat
  was gone. | Soon the road ended at a deep river.
- A beaver helped {him} to build a raft, and {H} gave the beaver some {food} for it. | {He} tied some branches
  together and crossed the water on them. | A friendly duck showed {him} where the water was low.
- Then a thick fog came down, and {he} could not see the path. | Then night came, and {he} did not know which
  way to go. | On the other side the path split in two.
- {He} listened. Far away a bell was ringing, and {he} followed the sound. | An owl called from a tree, "Go
  left, go left!" | {He} sat down, waited until the stars came out, and followed the brightest one.
- At last {he} stood at the door of {F}. | Tired but happy, {he} reached the house of {F}. | In the morning
  {he} saw the house of {F} in front of {him}.
- {F} was so glad that {fhe} cooked {food2} for {him}, and they talked until midnight. | "You came all this
  way for me?" said {F}. "Then you must stay for a week." | {F} opened the door and said, "No letter was ever
  carried by a better friend."
# trade
- One day {H} went to the market to trade {his} {col} {obj} for some {food}. | {H} was hungry, so {he} took
  {his} {col} {obj} to the market. | "I need some {food}," said {H}, and {he} took {his} {col} {obj} to the
  market.
- On the way {he} met {F}, who was crying. | Near the {place2} {he} met {F}, a {ftrait} {fkind}, who looked
  very sad. | By the road sat {F} the {fkind} with empty hands.
- "I lost my {obj}," said {F}, "and without it I cannot work." | "My {obj} was stolen," said {F}. | "Tomorrow
  is my mother's birthday," said {F}, "and I have no present for her."
- {H} looked at {his} own {obj}. {He} was hungry, but {he} could not walk on. | {H} thought about the {food},
  and then about {F}. | {H} did not think for long.
- "Take mine," {he} said. | {He} put the {col} {obj} into the hands of {F}. | "Here," said {H}. "You need it
  more than I do."
- {F} could not believe it. "How can I thank you?" {fhe} asked. | {F} jumped for joy and ran home. | "You are
  very kind," said {F}, and {fhe} ran away with a smile.
- That evening someone knocked at the door. It was {F} with a big basket of {food}. | The next morning a
  basket of {food} stood in front of the house. | When {H} came home, {F} was waiting there with a pot of hot
  {food}.
- They ate together until the stars came out. | "It is for you," said {F}, "because you did not ask for
  anything." | So {H} got {his} {food} after all, and a friend as well.
# music
- {H} wanted to play music more than anything, but {he} had no flute. | {H} loved to sing, but {he} was too
  shy to sing in front of others. | {H} could play the drum very well, but only when nobody was listening.
- So {he} went to the {place2} every evening, where {he} was alone. | Every night {he} practised {at2}, far
  away from everyone. | {He} practised in secret {at2}.
- One evening {F} passed by and heard {him}. | {F} the {fkind} heard the music and sat down behind a tree to
  listen. | But {F}, a {ftrait} {fkind}, had been listening all the time.
- "That was wonderful," said {F}. "You should play at the summer feast." | "Why do you hide?" asked {F}.
  "Everyone should hear this." | {F} clapped {fhis} hands. {H} was so surprised that {he} almost ran away.
- "I cannot," said {H}. "What if I make a mistake?" | "I am too afraid," said {H}. | {H} shook {his} head.
  "They will laugh at me," {he} said.
- "Then look only at me," said {F}. | "I will stand next to you," said {F}, "and hold your hand." | "A mistake
  is only a new song," said {F}.
- At the feast {H} looked at {F}, closed {his} eyes and began. | On the night of the feast {his} heart was
  beating, but {F} was there, and {he} began. | So {he} came to the feast, and {F} sat in the first row.
- When it was over, everyone was silent. Then they all cheered. | It was the most beautiful music they had
  ever heard {at}. | {He} did make a mistake, but nobody minded, and they danced until morning.
# neighbour
- One {weather} day somebody moved into the empty house next door. | One day a cart full of boxes stopped in
  front of the empty house. | For a long time the house next door had been empty. Then, one {weather} day,
  someone came.
- It was {F}, a {ftrait} {fkind}. | The new neighbour was a {fkind} named {F}. | {F} was the name on the door,
  and {F} was a {ftrait} {fkind}.
- {F} did not speak to anybody and kept the door shut. | "I do not like strangers," people said, and nobody
  went to say hello. | Everyone looked from far away, but nobody said a word.
- {H} thought, "It must be lonely to be new." | "Somebody has to be the first," thought {H}. | {H} remembered
  the day when {he} had been new {at} {himself}.
- So {he} took a bowl of {food} and knocked at the door. | So {he} cooked some {food} and brought it over. |
  {He} picked some flowers, took a basket of {food}, and went over.
- The door opened slowly. "For me?" asked {F}. | {F} looked at the {food}, and then {fhe} began to smile. |
  "Nobody has ever brought me anything," said {F}.
- They sat down and talked, and {F} showed {him} a {col} {obj} from far away. | {F} told {him} about the sea
  and about cities full of light. | It turned out that {F} knew a hundred stories.
- Soon everyone wanted to be a friend of {F}. But {H} had been the first. | After that, the door next door was
  always open. | And every evening two friends ate {food} together {at}.
"""


def _parse_plots(text: str) -> dict[str, list[list[str]]]:
    """{plot: beats}, each beat its alternative sentences, from the notation above."""
    return {name: [" ".join(beat.split()).split(" | ") for beat in beats]
            for name, *beats in (re.split(r"\n- ", plot.strip())
                                 for plot in re.split(r"^# ", text, flags=re.M)[1:])}


PLOTS = _parse_plots(_PLOTS)
ENDINGS = ("", "", "", " The end.", " And they lived happily ever after.",
           " And that is the end of the story.")
WEATHERS = "sunny rainy windy cold warm foggy".split()
_PRONOUNS = {True: ("she", "her", "her", "herself"), False: ("he", "him", "his", "himself")}


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _uncapital(text: str) -> str:
    return text[0].lower() + text[1:]


def _with_articles(text: str) -> str:
    """`text` with "a" before a vowel sound turned into "an"; templates always write "a"."""
    return re.sub(r"\b([Aa]) (?=[aeiou]|honest)", r"\1n ", text)


def _name(rng: random.Random) -> tuple[str, bool]:
    """A name and whether it is a woman's; now and then invented, so that unknown names are copied too."""
    if rng.random() < 0.9:
        name = rng.choice(NAMES)
        return name, name in GIRLS
    syllables = (rng.choice("bdfgklmnprstvwz") + rng.choice("aeiou") for _ in range(rng.randint(2, 3)))
    return "".join(syllables).title() + rng.choice(("", "", "n", "r", "x")), rng.random() < 0.5


def _character(rng: random.Random, female: bool) -> str:
    roll = rng.random()
    if roll < 0.45:
        return rng.choice(ANIMALS)
    if roll < 0.75:
        return "girl" if female else "boy"
    if roll < 0.9:
        return rng.choice(JOBS)
    return rng.choice(HEROINES if female and roll < 0.93 else HEROES)


def _cast(rng: random.Random) -> tuple[str, str, dict[str, str]]:
    """(key, plot, fields) of a new story; the key is plot, hero and object."""
    plot = rng.choice(list(PLOTS))
    (hero, female), (friend, ffemale) = _name(rng), _name(rng)
    while friend == hero:
        friend, ffemale = _name(rng)
    he, him, his, himself = _PRONOUNS[female]
    fhe, fhim, fhis, _ = _PRONOUNS[ffemale]
    (place, at), (place2, at2) = rng.sample(list(PLACES.items()), 2)
    trait, trait2, ftrait = rng.sample(TRAITS, 3)
    food, food2 = rng.sample(FOODS, 2)
    kind = _character(rng, female)
    kind2 = rng.choice([animal for animal in ANIMALS if animal != kind])
    fields = dict(
        H=hero, he=he, him=him, his=his, himself=himself, He=he.title(), His=his.title(), kind=kind,
        trait=trait, trait2=trait2, F=friend, fhe=fhe, fhim=fhim, fhis=fhis, Fhe=fhe.title(),
        fkind=_character(rng, ffemale), ftrait=ftrait, mood=rng.choice(MOODS), kind2=kind2, place=place,
        at=at, place2=place2, at2=at2, At2=_capital(at2), food=food, food2=food2, obj=rng.choice(OBJECTS),
        col=rng.choice(COLOURS), weather=rng.choice(WEATHERS))
    return f"{plot} {hero} {fields['obj']}", plot, fields


# Plots that introduce the friend themselves; in the others the hero already knows {F}.
_MEETS_FRIEND = {"rescue", "letter", "trade", "neighbour", "music", "winter"}


def story(rng: random.Random, held: bool = False) -> tuple[str, dict[str, str]]:
    """One story of 60 to 220 words, in one or more paragraphs, and the fields it was made from."""
    plot, fields = draw(rng, "story", held, _cast)
    sentences = [rng.choice(OPENINGS)]
    if plot not in _MEETS_FRIEND:
        sentences.append(rng.choice(DETAILS))
    breaks = {2, 5} if rng.random() < 0.4 else set()
    text = " ".join(sentences)
    for i, beat in enumerate(PLOTS[plot]):
        text += ("\n\n" if i in breaks else " ") + rng.choice(beat)
    return _with_articles((text + rng.choice(ENDINGS)).format_map(fields)), fields


# ------------------------------------------------------------------------------------- sums, sorting, copying

def _sum(rng: random.Random) -> tuple[str, str, int]:
    """(key, expression, value); a sum and its commuted form are one item."""
    digits = rng.choice((1, 2, 2, 3, 3, 3, 3))
    a, b = rng.randrange(10 ** digits), rng.randrange(10 ** rng.randint(max(1, digits - 1), digits))
    if rng.random() < 0.5:
        a, b = b, a
    if rng.random() < 0.5:
        return f"{min(a, b)}+{max(a, b)}", f"{a} + {b}", a + b
    a, b = max(a, b), min(a, b)
    return f"{a}-{b}", f"{a} - {b}", a - b


def _product(rng: random.Random) -> tuple[str, int]:
    a, b = rng.randrange(10), rng.randrange(10)
    return f"{a} * {b}", a * b


SUM_QUESTIONS = ("What is {}?", "How much is {}?", "{}", "{} = ?", "Please compute {}.",
                 "Can you work out {}?", "Calculate {}.", "What does {} make?")


def sum_exchange(rng: random.Random, held: bool = False) -> Exchange:
    expression, value = draw(rng, "sums", held, _sum) if held or rng.random() < 0.9 else _product(rng)
    question = rng.choice(SUM_QUESTIONS).format(expression)
    if not held and rng.random() < 0.15:
        question = question.replace(" + ", "+").replace(" - ", "-").replace(" * ", "*")
    elif not held and rng.random() < 0.15:
        question = question.replace(" + ", " plus ").replace(" - ", " minus ").replace(" * ", " times ")
    return question, f"{expression} = {value}"


def sum_completion(rng: random.Random, held: bool = False) -> Exchange:
    expression, value = draw(rng, "sums", held, _sum) if held or rng.random() < 0.93 else _product(rng)
    return f"{expression} =", f" {value}"


def _list(rng: random.Random) -> tuple[str, list, list]:
    """(key, items, sorted items); the order in which they stand does not make a new item."""
    count = rng.randint(3, 6)
    if rng.random() < 0.6:
        items: list = rng.sample(range(10 ** rng.choice((2, 3, 3))), count)
    else:
        items = rng.sample(WORDS, count)
    ordered = sorted(items)
    return " ".join(map(str, ordered)), items, ordered


def sorting_exchange(rng: random.Random, held: bool = False) -> Exchange:
    items, ordered = draw(rng, "sorting", held, _list)
    if isinstance(items[0], int):
        ask = rng.choice(("Sort these numbers: {}", "Please sort these numbers: {}",
                          "Put these numbers in order: {}", "Sort from smallest to largest: {}",
                          "Sort from largest to smallest: {}"))
        if "largest to smallest" in ask:
            ordered = ordered[::-1]
    else:
        ask = rng.choice(("Sort these words: {}", "Please sort these words: {}",
                          "Put these words in order: {}", "Sort from A to Z: {}"))
    return ask.format(", ".join(map(str, items))), ", ".join(map(str, ordered))


def sorting_completion(rng: random.Random, held: bool = False) -> Exchange:
    items, ordered = draw(rng, "sorting", held, _list)
    return f"Sort: {' '.join(map(str, items))} ->", f" {' '.join(map(str, ordered))}"


def _string(rng: random.Random) -> tuple[str, str]:
    pieces = []
    for _ in range(rng.randint(2, 7)):
        roll = rng.random()
        if roll < 0.4:
            pieces.append("".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(1, 6))))
        elif roll < 0.55:
            pieces.append("".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", k=rng.randint(1, 5))))
        elif roll < 0.7:
            pieces.append(str(rng.randrange(10 ** rng.randint(1, 5))))
        else:
            pieces.append(rng.choice(WORDS if roll < 0.9 else NAMES))
    text = " ".join(pieces)
    return text, text


def copying_exchange(rng: random.Random, held: bool = False) -> Exchange:
    text, = draw(rng, "copying", held, _string)
    return rng.choice(("Repeat after me: {}", "Copy this: {}", "Please repeat: {}",
                       "Say this: {}")).format(text), text


def copying_completion(rng: random.Random, held: bool = False) -> Exchange:
    text, = draw(rng, "copying", held, _string)
    return f"Copy: {text} ->", f" {text}"


# ----------------------------------------------------------------------------------------------------- recall

# attribute: (statement, question, possible values); values of "number" are drawn.
ATTRIBUTES: dict[str, tuple[str, str, list[str]]] = {
    "number": ("{}'s number is {}.", "What is {}'s number?", []),
    "hat": ("{}'s hat is {}.", "What colour is {}'s hat?", COLOURS),
    "food": ("{} likes to eat {}.", "What does {} like to eat?", FOODS),
    "box": ("{}'s box holds a {}.", "What does {}'s box hold?", OBJECTS),
    "place": ("{} is waiting {}.", "Where is {} waiting?", list(PLACES.values()))}


def _fact(rng: random.Random, name: str, held: bool) -> tuple[str, str, str]:
    """(statement, question, value) of a new fact about `name`; the key is name, attribute and value."""
    def make(rng: random.Random) -> tuple[str, str, str, str]:
        attribute = rng.choice(list(ATTRIBUTES))
        statement, question, values = ATTRIBUTES[attribute]
        value = rng.choice(values) if values else str(rng.randrange(100, 10000))
        return f"{name} {attribute} {value}", statement.format(name, value), question.format(name), value
    return draw(rng, "recall", held, make)


def _facts(rng: random.Random, held: bool) -> tuple[str, str, str, str]:
    """(all statements, statement asked about, question, value); all other facts are on the training side."""
    names = rng.sample(NAMES, rng.randint(1, 6))
    facts = [_fact(rng, name, held and i == 0) for i, name in enumerate(names)]
    statement, question, value = facts[0]
    rng.shuffle(facts)
    return " ".join(fact[0] for fact in facts), statement, question, value


def recall_completion(rng: random.Random, held: bool = False) -> Exchange:
    statements, _, question, value = _facts(rng, held)
    stories = rng.choice((0, 1, 1) if held else (0, 1, 1, 1, 2))
    filler = "".join(f"\n\n{story(rng)[0]}" for _ in range(stories))
    return f"Facts: {statements}{filler}\n\nQuestion: {question}\nAnswer:", f" {value}"


def recall_conversation(rng: random.Random, held: bool = False) -> list[Exchange]:
    statements, statement, question, _ = _facts(rng, held)
    told = rng.choice(("Remember this: {}", "Please remember: {}",
                       "Here are some facts. {}")).format(statements)
    between = [story_exchange(rng) if rng.random() < 0.4 else small_exchange(rng)
               for _ in range(rng.randint(0, 2))]
    return [(told, "I will remember that."), *between, (question, statement)]


# -------------------------------------------------------------------------------------- questions and answers

SOUNDS = dict(pair.split("/") for pair in """cow/moo dog/woof cat/meow duck/quack sheep/baa pig/oink
horse/neigh rooster/cock-a-doodle-doo owl/hoot lion/roar frog/ribbit bee/buzz snake/hiss mouse/squeak crow/caw
wolf/howl donkey/hee-haw hen/cluck bird/tweet turkey/gobble dove/coo""".split())
YOUNG = dict(pair.split("/") for pair in """cow/calf dog/puppy cat/kitten sheep/lamb horse/foal duck/duckling
hen/chick bear/cub goat/kid deer/fawn frog/tadpole swan/cygnet pig/piglet goose/gosling owl/owlet
kangaroo/joey""".split())
LEGS = {"cow": 4, "dog": 4, "cat": 4, "horse": 4, "duck": 2, "hen": 2, "owl": 2, "spider": 8, "ant": 6,
        "bee": 6, "snake": 0, "fish": 0, "crab": 10, "sheep": 4, "beetle": 6}
THING_COLOURS = dict(pair.split("/") for pair in """grass/green snow/white coal/black milk/white
chocolate/brown corn/yellow lettuce/green butter/yellow night/black lava/red sky/blue sea/blue sun/yellow
banana/yellow lemon/yellow tomato/red carrot/orange frog/green flamingo/pink raven/black swan/white
strawberry/red pumpkin/orange elephant/grey plum/purple leaf/green pig/pink bear/brown cherry/red
violet/purple""".split())
_MASS_NOUNS = {"grass", "snow", "coal", "milk", "chocolate", "corn", "lettuce", "butter", "lava"}
OPPOSITES = dict(pair.split("/") for pair in """hot/cold big/small tall/short fast/slow day/night up/down
left/right open/closed wet/dry old/young happy/sad full/empty hard/soft light/dark loud/quiet early/late
rich/poor strong/weak clean/dirty thick/thin near/far high/low first/last good/bad true/false black/white
win/lose push/pull begin/end buy/sell laugh/cry love/hate awake/asleep above/below inside/outside always/never
wide/narrow deep/shallow sweet/sour brave/afraid""".split())
OPPOSITES |= {b: a for a, b in OPPOSITES.items()}
TOOLS = {
    "cut bread": "knife", "write": "pencil", "drive in a nail": "hammer", "eat soup": "spoon",
    "open a lock": "key", "tell the time": "clock", "dig a hole": "spade", "sew": "needle",
    "sweep the floor": "broom", "see in the dark": "lantern", "climb onto a roof": "ladder",
    "cut paper": "pair of scissors", "cross a lake": "boat", "stay dry in the rain": "umbrella",
    "brush your teeth": "toothbrush"}
WORKERS = {
    "bakes bread": "baker", "grows corn": "farmer", "sails a ship": "sailor", "paints pictures": "painter",
    "makes pots": "potter", "looks after sheep": "shepherd", "sews clothes": "tailor",
    "teaches children": "teacher", "puts out fires": "firefighter", "heals the sick": "doctor",
    "grows flowers": "gardener", "grinds flour": "miller", "builds tables": "carpenter",
    "catches fish": "fisher", "brings letters": "postman"}
SIDES = {"triangle": 3, "square": 4, "pentagon": 5, "hexagon": 6, "rectangle": 4, "octagon": 8}
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
SEASONS = "spring summer autumn winter".split()
LETTERS = [chr(c) for c in range(ord("A"), ord("Z") + 1)]
COUNTS = "zero one two three four five six seven eight nine ten".split()


def _the(noun: str) -> str:
    """How a coloured thing is named: mass nouns bare, unique things with "the", others with "a"."""
    if noun in _MASS_NOUNS:
        return noun
    return f"the {noun}" if noun in {"sky", "sea", "sun", "night"} else f"a {noun}"


# Answers to facts whose every wording the hash keeps out of training: nothing to ask a model for.
_UNTAUGHT: set[str] = set()


def _table(table: dict, questions: tuple[str, ...], answer: str) -> Callable[[random.Random], Exchange]:
    """Questions about the facts of `table`, each in several wordings and with one answer."""
    facts = []
    for item, value in table.items():
        fields = dict(x=item, y=COUNTS[value] if isinstance(value, int) else value, the=_the(item))
        facts.append(([_with_articles(question.format_map(fields)) for question in questions],
                      _capital(_with_articles(answer.format_map(fields)))))
    _UNTAUGHT.update(says for asks, says in facts if all(held_out("qa", ask) for ask in asks))

    def make(rng: random.Random) -> Exchange:
        asks, says = rng.choice(facts)
        return rng.choice(asks), says
    return make


def _cycle(noun: str, items: list[str], wraps: bool) -> Callable[[random.Random], Exchange]:
    def make(rng: random.Random) -> Exchange:
        i = rng.randrange(len(items) - (0 if wraps else 1))
        first, second = items[i], items[(i + 1) % len(items)]
        after = ("What {n} comes after {x}?", "Which {n} comes after {x}?", "What {n} comes next after {x}?",
                 "What is the {n} after {x}?", "Tell me the {n} that follows {x}.")
        before = ("What {n} comes before {x}?", "Which {n} comes before {x}?",
                  "What {n} comes just before {x}?", "What is the {n} before {x}?",
                  "Tell me the {n} that comes before {x}.")
        if rng.random() < 0.5:
            return rng.choice(after).format(n=noun, x=first), f"{_capital(second)} comes after {first}."
        return rng.choice(before).format(n=noun, x=second), f"{_capital(first)} comes before {second}."
    return make


def _neighbours(rng: random.Random) -> Exchange:
    n = rng.randrange(1, 999)
    step, where = rng.choice(((1, "after"), (-1, "before")))
    ask = rng.choice(("What number comes {} {}?", "What comes {} {}?"))
    return ask.format(where, n), f"{n + step} comes {where} {n}."


def _compare(rng: random.Random) -> Exchange:
    a, b = rng.sample(range(10 ** rng.choice((2, 3))), 2)
    if rng.random() < 0.5:
        ask = rng.choice(("Which is larger, {} or {}?", "Which number is larger, {} or {}?"))
        return ask.format(a, b), f"{max(a, b)} is larger than {min(a, b)}."
    ask = rng.choice(("Which is smaller, {} or {}?", "Which number is smaller, {} or {}?"))
    return ask.format(a, b), f"{min(a, b)} is smaller than {max(a, b)}."


def _parity(rng: random.Random) -> Exchange:
    n = rng.randrange(1000)
    return f"Is {n} even or odd?", f"{n} is {'odd' if n % 2 else 'even'}."


def _letters(rng: random.Random) -> Exchange:
    word = rng.choice(WORDS)
    kind = rng.randrange(3)
    if kind == 0:
        ask = rng.choice(("How do you spell {}?", "Spell the word {}.", "Please spell {}.",
                          "Can you spell {}?"))
        return ask.format(word), "-".join(word)
    which, letter = ("first", word[0]) if kind == 1 else ("last", word[-1])
    ask = rng.choice(("What is the {} letter of {}?", "Which is the {} letter of {}?",
                      "Tell me the {} letter of the word {}."))
    return ask.format(which, word), f"The {which} letter of {word} is {letter}."


def _owners(rng: random.Random) -> Exchange:
    names, things = rng.sample(NAMES, rng.randint(2, 3)), rng.sample(OBJECTS, 3)
    colours = rng.sample(COLOURS, 3)
    told = _with_articles(" ".join(f"{n} has a {c} {t}." for n, c, t in zip(names, colours, things)))
    i = rng.randrange(len(names))
    if rng.random() < 0.5:
        return f"{told} Who has the {things[i]}?", f"{names[i]} has the {things[i]}."
    return f"{told} What does {names[i]} have?", _with_articles(f"{names[i]} has a {colours[i]} {things[i]}.")


def _taller(rng: random.Random) -> Exchange:
    a, b = rng.sample(NAMES, 2)
    more, less = rng.choice((("taller", "shorter"), ("older", "younger"), ("faster", "slower"),
                             ("stronger", "weaker")))
    if rng.random() < 0.5:
        more, less = less, more
    ask = rng.choice((more, less))
    return f"{a} is {more} than {b}. Who is {ask}?", f"{a if ask == more else b} is {ask}."


def _word_problem(rng: random.Random) -> Exchange:
    name, food = rng.choice(NAMES), rng.choice([f for f in FOODS if f.endswith("s")])
    while True:
        a, b = rng.randrange(1, 60), rng.randrange(1, 40)
        if rng.random() < 0.5 and not held_out("sums", f"{min(a, b)}+{max(a, b)}"):
            return (f"{name} has {a} {food} and gets {b} more. How many {food} does {name} have now?",
                    f"{name} has {a + b} {food} now.")
        if b < a and not held_out("sums", f"{a}-{b}"):
            return (f"{name} has {a} {food} and gives away {b}. How many {food} does {name} have now?",
                    f"{name} has {a - b} {food} now.")


QUESTIONS: tuple[Callable[[random.Random], Exchange], ...] = (
    _table(SOUNDS, ("What sound does a {x} make?", "What does a {x} say?", "Which sound does a {x} make?",
                    "How does a {x} sound?", "Tell me the sound of a {x}.", "What noise does a {x} make?"),
           "a {x} says {y}."),
    _table(YOUNG, ("What is a baby {x} called?", "What do you call a baby {x}?",
                   "What is a young {x} called?", "What do you call a young {x}?",
                   "Tell me the name for a baby {x}."),
           "a baby {x} is called a {y}."),
    _table(LEGS, ("How many legs does a {x} have?", "How many legs has a {x}?",
                  "What number of legs does a {x} have?", "Tell me how many legs a {x} has."),
           "a {x} has {y} legs."),
    _table(THING_COLOURS, ("What colour is {the}?", "What color is {the}?", "Which colour is {the}?",
                           "What is the colour of {the}?", "Tell me the colour of {the}."), "{the} is {y}."),
    _table(OPPOSITES, ("What is the opposite of {x}?", "Tell me the opposite of {x}.",
                       "Which word is the opposite of {x}?", "Give me the opposite of {x}.",
                       "What word means the opposite of {x}?"), "the opposite of {x} is {y}."),
    _table(TOOLS, ("What do you use to {x}?", "What do you need to {x}?", "Which thing do you use to {x}?",
                   "With what can you {x}?"), "you use a {y} to {x}."),
    _table(WORKERS, ("Who {x}?", "Tell me who {x}.", "What do you call someone who {x}?",
                     "What is the name of someone who {x}?"), "a {y} {x}."),
    _table(SIDES, ("How many sides does a {x} have?", "How many sides has a {x}?",
                   "Tell me how many sides a {x} has."), "a {x} has {y} sides."),
    _cycle("day", DAYS, True), _cycle("month", MONTHS, True), _cycle("season", SEASONS, True),
    _cycle("letter", LETTERS, False), _neighbours, _compare, _parity, _letters, _owners,
    _taller, _word_problem)


def question_exchange(rng: random.Random, held: bool = False) -> Exchange:
    """A question about this script's little world; the key is its wording, so a held-out one rephrases."""
    make = rng.choice(QUESTIONS)

    def keyed(rng: random.Random) -> tuple[str, str, str]:
        question, answer = make(rng)
        return question, question, answer
    question, answer = draw(rng, "qa", held, keyed)
    return question_exchange(rng, held) if held and answer in _UNTAUGHT else (question, answer)


# ------------------------------------------------------------------------------------------------------- chat

ABOUT = ("I can tell short stories, do small sums, sort lists, copy text, remember facts and answer simple "
         "questions.")
HELLO, FINE, BYE, NEXT = ("Hello! How can I help you?", "I am fine, thank you. How can I help you?",
                          "Goodbye! Have a nice day.", "What would you like to do next?")
GREETINGS = {
    "Hello!": HELLO, "Hi!": HELLO, "Hello there.": HELLO, "Hey!": HELLO,
    "Good morning!": "Good morning! How can I help you?",
    "Good evening!": "Good evening! How can I help you?",
    "How are you?": FINE, "How are you today?": FINE, "How do you do?": FINE}
THANKS = {
    "Thank you!": "You are welcome!", "Thanks!": "You are welcome!",
    "Thank you very much.": "You are welcome!",
    "That was nice.": "I am glad that you like it.", "Well done!": "Thank you!", "Good job!": "Thank you!",
    "Goodbye!": BYE, "Bye!": BYE, "See you later.": BYE, "Good night!": "Good night! Sleep well.",
    "Okay.": NEXT, "Yes.": NEXT}
WHO = ("Who are you?", "What are you?", "What is your name?", "Tell me about yourself.", "Are you a human?",
       "Who am I talking to?")
CAN = ("What can you do?", "What can you help me with?", "How can you help me?", "Help!", "What do you know?",
       "What should I ask you?")
OFFER = "I am a very small model. Ask me for a story, a small sum, or a list to sort."
UNKNOWN = f"I do not know that. {OFFER}"
UNCLEAR = f"I do not understand that. {OFFER}"
MOOD_EXCHANGES: tuple[Exchange, ...] = (
    ("Tell me a joke.", "Why did the hen cross the road? To get to the other side!"),
    ("Do you know a joke?", "Why did the hen cross the road? To get to the other side!"),
    ("I am sad.", "I am sorry to hear that. Would you like to hear a story?"),
    ("I am bored.", "Would you like to hear a story?"), ("I am tired.", "Then sleep well!"),
    ("I am happy.", "I am glad to hear that!"), ("I like you.", "Thank you! I like you too."),
    ("Sing a song.", "I cannot sing, but I can tell you a story."),
    ("Are you real?", "I am a very small language model."),
    ("Do you like me?", "Yes, I like everyone who asks me for a story."),
    ("What time is it?", "I do not have a clock."), ("What day is today?", "I do not have a calendar."))
UNKNOWN_QUESTIONS = (
    "What is the capital of {}?", "Who wrote {}?", "How far is {} from here?", "Who is the president of {}?",
    "Explain {} to me.", "What is {}?", "How does {} work?", "When was {} built?",
    "Write a program about {}.", "Translate {} into French.", "What is the weather in {}?",
    "Who won {} last year?", "How many people live in {}?", "What do you think about {}?",
    "Where is {}?", "Why is {} so important?", "How old is {}?", "What is the history of {}?")
UNKNOWN_TOPICS = """France Germany Paris London Berlin Rome Tokyo China India Africa America Canada Spain
Italy physics chemistry mathematics football tennis chess electricity gravity computers Python music history
philosophy politics Shakespeare Einstein Mozart Napoleon Hamlet the_moon the_internet the_ocean the_universe
a_black_hole a_computer an_engine a_transistor quantum_mechanics machine_learning a_neural_network
the_stock_market the_world_cup the_war the_economy love time money energy light""".split()
STORY_REQUESTS = (
    "Tell me a story about {}.", "Please tell me a story about {}.", "Can you tell me a story about {}?",
    "Write a story about {}.", "I want to hear a story about {}.", "Tell a short story about {}.")


def story_exchange(rng: random.Random) -> Exchange:
    text, fields = story(rng)
    roll = rng.random()
    if roll < 0.2:
        return rng.choice(("Tell me a story.", "Please tell me a story.", "Can you tell me a story?",
                           "I want to hear a story.", "Write a short story.", "Tell me another story.")), text
    subjects = [f"a {fields['kind']}", f"a {fields['kind']} named {fields['H']}", fields["H"],
                f"{fields['H']} and {fields['F']}"]
    objects = f"{fields['col']} {fields['obj']}"
    if objects in text:
        subjects += [f"a {objects}", f"a {fields['kind']} and a {fields['obj']}"]
    return _with_articles(rng.choice(STORY_REQUESTS).format(rng.choice(subjects))), text


def unknown_exchange(rng: random.Random) -> Exchange:
    roll = rng.random()
    if roll < 0.2:
        return rng.choice(MOOD_EXCHANGES)
    if roll < 0.3:
        noise = ("".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(1, 7)))
                 for _ in range(rng.randint(1, 3)))
        return " ".join(noise), UNCLEAR
    return rng.choice(UNKNOWN_QUESTIONS).format(rng.choice(UNKNOWN_TOPICS).replace("_", " ")), UNKNOWN


def small_exchange(rng: random.Random) -> Exchange:
    """One short turn of any subject but stories."""
    roll = rng.random()
    if roll < 0.6:
        return question_exchange(rng)
    if roll < 0.75:
        return sum_exchange(rng)
    if roll < 0.85:
        return sorting_exchange(rng)
    if roll < 0.92:
        return copying_exchange(rng)
    return unknown_exchange(rng)


def _introduction(name: str) -> str:
    return f"I am {name}, a very small language model. {ABOUT}"


def _untidy(rng: random.Random, text: str) -> str:
    """A user's message as people type it: with a greeting, shortened, without capitals or a final mark."""
    roll = rng.random()
    if text.endswith("?"):
        if roll < 0.05:
            text = f"Please tell me: {text}"
        elif roll < 0.1:
            text = f"{rng.choice(('Hi', 'Hello', 'Hey'))}, {_uncapital(text)}"
        elif roll < 0.2:
            text = text.replace("What is", "What's").replace("Who is", "Who's").replace("what is", "what's")
    if rng.random() < 0.2 and text[-1] in ".?!":
        text = text[:-1]
    if rng.random() < 0.2 and ":" not in text:
        text = _uncapital(text)
    return text


# system prompt -> what it does to every answer; {} is a word or name drawn for the conversation.
STYLES: tuple[tuple[str, Callable[[str, str], str]], ...] = (
    ("Answer in capital letters.", lambda answer, word: answer.upper()),
    ("End every answer with the word {}.", lambda answer, word: f"{answer} {word}!"),
    ("Begin every answer with the word {}.", lambda answer, word: f"{word}! {answer}"))
STYLE_WORDS = ("Ahoy", "Hurray", "Cheers", "Bravo", "Amen", "Indeed", "Voila", "Aye", "Yes", "Sir")
PLAIN_SYSTEMS = ("You are a helpful assistant.", "You are a friendly assistant.",
                 "You are a small model that helps people.", "Be helpful and polite.")


def styled(rng: random.Random, exchanges: list[Exchange]) -> tuple[str, list[Exchange]]:
    """A system prompt that asks for a way of answering, and the exchanges answered in that way."""
    system, apply = rng.choice(STYLES)
    word = rng.choice(STYLE_WORDS)
    return system.format(word), [(user, apply(answer, word)) for user, answer in exchanges]


def conversation(rng: random.Random) -> Messages:
    """A chat of one to six turns, with or without a system prompt."""
    roll = rng.random()
    if roll < 0.12:
        system, exchanges = styled(rng, [question_exchange(rng) for _ in range(rng.randint(1, 3))])
        return messages([(_untidy(rng, user), answer) for user, answer in exchanges], system)
    name = "Demo"
    system = rng.choice(PLAIN_SYSTEMS) if roll < 0.2 else None
    if 0.2 <= roll < 0.4:
        name = _name(rng)[0]
        system = rng.choice(("Your name is {}.", "You are {}.",
                             "You are an assistant called {}.")).format(name)
    exchanges: list[Exchange] = []
    if rng.random() < 0.25:
        exchanges.append(rng.choice(list(GREETINGS.items())))
    if rng.random() < (0.7 if name != "Demo" else 0.15):
        exchanges.append((rng.choice(WHO), _introduction(name)))
    if rng.random() < 0.08:
        exchanges.append((rng.choice(CAN), ABOUT))
    user_name = rng.choice(NAMES) if rng.random() < 0.15 else None
    if user_name:
        told = rng.choice(("My name is {}.", "I am {}.", "Hello, I am {}.",
                           "Hi! My name is {}.")).format(user_name)
        exchanges.append((told, f"Nice to meet you, {user_name}. How can I help you?"))
    exchanges += [small_exchange(rng) for _ in range(rng.choice((1, 1, 2, 3)))]
    if rng.random() < 0.1:
        exchanges.append(story_exchange(rng))
    if rng.random() < 0.1:
        exchanges += _running_sum(rng)
    if user_name:
        exchanges.append((rng.choice(("What is my name?", "Do you remember my name?", "Who am I?")),
                          f"Your name is {user_name}."))
    if rng.random() < 0.2:
        exchanges.append(rng.choice(list(THANKS.items())))
    return messages([(_untidy(rng, user), answer) for user, answer in exchanges], system)


def _running_sum(rng: random.Random) -> list[Exchange]:
    """A sum and a follow-up that goes on from its result; both on the training side of the split."""
    while True:
        a, b, c = (rng.randrange(1, 100) for _ in range(3))
        total = a + b
        if not any(held_out("sums", f"{min(x, y)}+{max(x, y)}") for x, y in ((a, b), (total, c))):
            return [(f"What is {a} + {b}?", f"{a} + {b} = {total}"),
                    (f"And if you add {c}?", f"{total} + {c} = {total + c}")]


def messages(exchanges: list[Exchange], system: str | None = None) -> Messages:
    out = [] if system is None else [{"role": "system", "content": system}]
    for user, assistant in exchanges:
        out += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return out


# -------------------------------------------------------------------------------------------------- documents

CHAT_TEMPLATE = (
    "{{- bos_token }}\n"
    "{%- for message in messages %}\n"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}\n"
    "{{- message['content'] | trim + '<|eot_id|>' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n"
    "{%- endif %}\n")


def chat_document(chat: Messages) -> Document:
    """The segments that CHAT_TEMPLATE prints; the assistant's words and the end of its turn are learned."""
    segments: Document = [(BOS, False)]
    for message in chat:
        answer = message["role"] == "assistant"
        segments += [(HEADER, False), (message["role"], False), (END_HEADER, False), ("\n\n", False),
                     (message["content"], answer), (EOT, answer)]
    return segments


def prompt_segments(item: dict) -> Document:
    """The segments of a held-out item up to where the model answers."""
    if "messages" in item:
        header = [(HEADER, False), ("assistant", False), (END_HEADER, False), ("\n\n", False)]
        return chat_document(item["messages"]) + header
    return [(BOS, False), (item["prompt"], False)]


def completion_document(exchange: Exchange) -> Document:
    return [(BOS, False), (exchange[0], False), (exchange[1], True), (EOS, True)]


def _story_document(rng: random.Random) -> Document:
    return [(BOS, False), (story(rng)[0], True), (EOS, True)]


def _chat_of(make: Callable[[random.Random], Exchange], rng: random.Random) -> Document:
    """One exchange, or a few in a row, of one kind."""
    return chat_document(messages([make(rng) for _ in range(rng.choice((1, 1, 2)))]))


def _completion_of(make: Callable[[random.Random], Exchange], rng: random.Random) -> Document:
    return completion_document(make(rng))


# (weight, maker) of a document: stories are long and sums short, so the shares of tokens are much more even.
MIX: tuple[tuple[int, Callable[[random.Random], Document]], ...] = (
    (60, _story_document),
    (30, lambda rng: chat_document(messages([story_exchange(rng)]))),
    (200, partial(_completion_of, sum_completion)), (90, partial(_chat_of, sum_exchange)),
    (130, partial(_completion_of, sorting_completion)), (80, partial(_chat_of, sorting_exchange)),
    (50, partial(_completion_of, copying_completion)), (30, partial(_chat_of, copying_exchange)),
    (40, partial(_completion_of, recall_completion)),
    (30, lambda rng: chat_document(messages(recall_conversation(rng)))),
    (100, lambda rng: chat_document(conversation(rng))),
    (160, partial(_chat_of, question_exchange)))


def documents(seed: int) -> Iterator[Document]:
    """An endless stream of training documents, the same for the same seed."""
    rng = random.Random(seed)
    makers = [make for _, make in MIX]
    weights = [weight for weight, _ in MIX]
    while True:
        for make in rng.choices(makers, weights, k=1024):
            yield make(rng)


# --------------------------------------------------------------------------------------------------- held-out

def _held_item(kind: str, rng: random.Random) -> dict:
    if kind == "qa":
        exchanges, system = [question_exchange(rng, held=True)], None
        roll = rng.random()
        if roll < 0.2:
            system, exchanges = styled(rng, exchanges)
        elif roll < 0.4:
            system = rng.choice(PLAIN_SYSTEMS)
        elif roll < 0.6:
            exchanges.insert(0, rng.choice(list(GREETINGS.items())))
        chat = messages(exchanges, system)
    elif rng.random() < 0.5:
        completion = {"sums": sum_completion, "sorting": sorting_completion, "copying": copying_completion,
                      "recall": recall_completion}[kind]
        prompt, answer = completion(rng, held=True)
        return {"kind": kind, "prompt": prompt, "answer": answer.strip()}
    elif kind == "recall":
        chat = messages(recall_conversation(rng, held=True))
    else:
        exchange = {"sums": sum_exchange, "sorting": sorting_exchange, "copying": copying_exchange}[kind]
        chat = messages([exchange(rng, held=True)])
    return {"kind": kind, "messages": chat[:-1], "answer": chat[-1]["content"]}


def held_out_items(kind: str, count: int, seed: int = 0) -> list[dict]:
    """`count` different items of a scored kind: {"kind", "prompt" or "messages", "answer"}.

    An answer is right when the greedy text, up to the first newline or end token and stripped, equals it. A
    smaller `count` gives a prefix of a larger one.
    """
    rng = random.Random(f"{kind} {seed}")
    items: dict[str, dict] = {}
    while len(items) < count:
        item = _held_item(kind, rng)
        items.setdefault(item["prompt"] if "prompt" in item else item["messages"][-1]["content"], item)
    return list(items.values())
