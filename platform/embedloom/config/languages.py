"""Languages by ISO 639-3 code: which a config may name, and what a prompt calls them in English.

The list holds every language of XLM-R (arXiv 1911.02116, table 6), which e5-mistral samples its synthetic data
from (arXiv 2401.00368 §4.1), and the further ones that the language check can tell apart. A macrolanguage code
(``zho``, ``nor``, ``ara``) stands for its usual written form, as XLM-R uses it.
"""

import difflib
from collections.abc import Mapping

# code, then the ISO 639-1 code where there is one, then the English name.
_TABLE = """
afr af Afrikaans
amh am Amharic
ara ar Arabic
asm as Assamese
aze az Azerbaijani
bel be Belarusian
ben bn Bengali
bos bs Bosnian
bre br Breton
bul bg Bulgarian
cat ca Catalan
ces cs Czech
cym cy Welsh
dan da Danish
deu de German
ell el Greek
eng en English
epo eo Esperanto
est et Estonian
eus eu Basque
fas fa Persian
fin fi Finnish
fra fr French
fry fy Western Frisian
gla gd Scottish Gaelic
gle ga Irish
glg gl Galician
guj gu Gujarati
hau ha Hausa
heb he Hebrew
hin hi Hindi
hrv hr Croatian
hun hu Hungarian
hye hy Armenian
ind id Indonesian
isl is Icelandic
ita it Italian
jav jv Javanese
jpn ja Japanese
kan kn Kannada
kat ka Georgian
kaz kk Kazakh
khm km Khmer
kir ky Kyrgyz
kor ko Korean
kur ku Kurdish
lao lo Lao
lat la Latin
lav lv Latvian
lit lt Lithuanian
mal ml Malayalam
mar mr Marathi
mkd mk Macedonian
mlg mg Malagasy
mon mn Mongolian
msa ms Malay
mya my Burmese
nep ne Nepali
nld nl Dutch
nor no Norwegian
ori or Odia
orm om Oromo
pan pa Punjabi
pol pl Polish
por pt Portuguese
pus ps Pashto
ron ro Romanian
rus ru Russian
san sa Sanskrit
sin si Sinhala
slk sk Slovak
slv sl Slovenian
snd sd Sindhi
som so Somali
spa es Spanish
sqi sq Albanian
srp sr Serbian
sun su Sundanese
swa sw Swahili
swe sv Swedish
tam ta Tamil
tel te Telugu
tgl tl Tagalog
tha th Thai
tur tr Turkish
uig ug Uyghur
ukr uk Ukrainian
urd ur Urdu
uzb uz Uzbek
vie vi Vietnamese
xho xh Xhosa
yid yi Yiddish
zho zh Chinese
ace - Acehnese
arg an Aragonese
ary - Moroccan Arabic
arz - Egyptian Arabic
ast - Asturian
bak ba Bashkir
cmn zh Mandarin Chinese
crh - Crimean Tatar
ekk et Standard Estonian
fao fo Faroese
fil tl Filipino
grn gn Guarani
hat ht Haitian Creole
hbs sr Serbo-Croatian
ibo ig Igbo
kab - Kabyle
kin rw Kinyarwanda
lij - Ligurian
lin ln Lingala
ltz lb Luxembourgish
lug lg Ganda
lvs lv Standard Latvian
mlt mt Maltese
nno nn Norwegian Nynorsk
nob no Norwegian Bokmål
nso - Northern Sotho
oci oc Occitan
pcm - Nigerian Pidgin
pes fa Iranian Persian
que qu Quechua
sme se Northern Sami
sna sn Shona
sot st Southern Sotho
tat tt Tatar
tgk tg Tajik
tuk tk Turkmen
vec - Venetian
wln wa Walloon
wuu - Wu Chinese
yor yo Yoruba
yue - Cantonese
zsm ms Standard Malay
zul zu Zulu
"""


def _read() -> dict[str, tuple[str, str]]:
    rows = (line.split(maxsplit=2) for line in _TABLE.strip().splitlines())
    return {code: (code if short == "-" else short, name) for code, short, name in rows}


_LANGUAGES = _read()
LANGUAGE_CODES = tuple(sorted(_LANGUAGES))


def language_name(code: str) -> str:
    """English name of ``zho``, ``zho-CN`` or ``zho_Hans``; a code the table lacks stands for itself."""
    return _LANGUAGES[base_code(code)][1] if base_code(code) in _LANGUAGES else code


def short_code(code: str) -> str | None:
    """ISO 639-1 code, or the 639-3 code of a language that has none; None for one the table lacks."""
    known = _LANGUAGES.get(base_code(code))
    return known[0] if known else None


def long_code(short: str) -> str | None:
    """ISO 639-3 code of an ISO 639-1 code, of several the usual written form; None for one the table lacks."""
    return next((code for code, (own, _) in _LANGUAGES.items() if own == short), None)


def base_code(code: str) -> str:
    """The language of a code that may name a script or region after a hyphen or underscore."""
    return code.replace("_", "-").split("-", 1)[0].lower()


def check_languages(weights: Mapping[str, float]) -> None:
    """Raise ValueError naming the first unknown code, or a weight that is not above zero."""
    for code, weight in weights.items():
        if code not in _LANGUAGES:
            near = ", ".join(difflib.get_close_matches(code, LANGUAGE_CODES, n=3, cutoff=0.0))
            raise ValueError(
                f"{code!r} is no known language; allowed: one of {len(LANGUAGE_CODES)} ISO 639-3 codes such as eng, "
                f"deu, zho; the nearest are {near}"
            )
        if not weight > 0:
            raise ValueError(f"the weight of {code!r} is {weight:g}; allowed: above 0")
    if not weights:
        raise ValueError("no language is given; allowed: {code: weight, ...} with at least one")
