"""Element symbols, masses, and the order in which formulas list them, for parts that run without pymatgen."""

# ruff: noqa: SIM905 (a table of words reads better as text)

from cfrl.errors import UserError

# indexed by atomic number; 0 is an empty site
SYMBOLS = tuple(
    (
        "X H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr "
        "Rb Sr Y Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb "
        "Lu Hf Ta W Re Os Ir Pt Au Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr Rf "
        "Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts Og"
    ).split()
)

NUM_ELEMENTS = len(SYMBOLS)  # with 0 = empty
ATOMIC_NUMBERS = {symbol: number for number, symbol in enumerate(SYMBOLS) if number}

# standard atomic weights (u), indexed by atomic number
# fmt: off
MASSES = (
    0.0, 1.00794, 4.002602, 6.941, 9.012182, 10.811, 12.0107, 14.0067, 15.9994, 18.9984032, 20.1797,
    22.98976928, 24.305, 26.9815386, 28.0855, 30.973762, 32.065, 35.453, 39.948, 39.0983, 40.078,
    44.955912, 47.867, 50.9415, 51.9961, 54.938045, 55.845, 58.933195, 58.6934, 63.546, 65.409, 69.723,
    72.64, 74.9216, 78.96, 79.904, 83.798, 85.4678, 87.62, 88.90585, 91.224, 92.90638, 95.94, 98.0,
    101.07, 102.9055, 106.42, 107.8682, 112.411, 114.818, 118.71, 121.76, 127.6, 126.90447, 131.293,
    132.9054519, 137.327, 138.90547, 140.116, 140.90765, 144.242, 145.0, 150.36, 151.964, 157.25,
    158.92535, 162.5, 164.93032, 167.259, 168.93421, 173.04, 174.967, 178.49, 180.94788, 183.84,
    186.207, 190.23, 192.217, 195.084, 196.966569, 200.59, 204.3833, 207.2, 208.9804, 210.0, 210.0,
    220.0, 223.0, 226.0, 227.0, 232.03806, 231.03588, 238.02891, 237.0, 244.0, 243.0, 247.0, 247.0,
    251.0, 252.0, 257.0, 258.0, 259.0, 262.0, 267.0, 268.0, 269.0, 270.0, 270.0, 278.0, 281.0, 282.0,
    285.0, 286.0, 289.0, 290.0, 293.0, 294.0, 294.0,
)

# covalent radii (Cordero et al. 2008), angstrom, indexed by atomic number; as in ASE beyond curium, where it ends
COVALENT_RADII = (
    0.0, 0.31, 0.28, 1.28, 0.96, 0.84, 0.76, 0.71, 0.66, 0.57, 0.58, 1.66, 1.41, 1.21, 1.11, 1.07, 1.05,
    1.02, 1.06, 2.03, 1.76, 1.7, 1.6, 1.53, 1.39, 1.39, 1.32, 1.26, 1.24, 1.32, 1.22, 1.22, 1.2, 1.19, 1.2,
    1.2, 1.16, 2.2, 1.95, 1.9, 1.75, 1.64, 1.54, 1.47, 1.46, 1.42, 1.39, 1.45, 1.44, 1.42, 1.39, 1.39, 1.38,
    1.39, 1.4, 2.44, 2.15, 2.07, 2.04, 2.03, 2.01, 1.99, 1.98, 1.98, 1.96, 1.94, 1.92, 1.92, 1.89, 1.9,
    1.87, 1.87, 1.75, 1.7, 1.62, 1.51, 1.44, 1.41, 1.36, 1.36, 1.32, 1.45, 1.46, 1.48, 1.4, 1.5, 1.5, 2.6,
    2.21, 2.15, 2.06, 2, 1.96, 1.9, 1.87, 1.8, 1.69, *[2.0] * 22,
)
# fmt: on

# by Pauling electronegativity, as formulas are written: cations first
_FORMULA_ORDER = (
    "Fr Cs K Rb Ba Ra Na Sr Li Ca Ac La Tb Yb Ce Pm Pr Nd Sm Eu Gd Dy Y Ho Er Tm Lu Pu Am Bk Cf Cm Es Fm "
    "Hf Lr Md No Th Mg Zr Np Sc U Pa Ta Ti Mn Be Nb Al Tl V Zn Cr Cd In Ga Fe Co Cu Re Si Tc Ni Ag Sn Hg "
    "Po Ge Bi B Sb Te Mo As P At H Ir Os Pd Rn Ru Pt Rh Pb W Au C Se S Xe I Br Kr N Cl O F Ar Bh Cn Db Ds "
    "Fl He Hs Lv Mc Mt Ne Nh Og Rf Rg Sg Ts"
).split()
FORMULA_RANK = {symbol: rank for rank, symbol in enumerate(_FORMULA_ORDER)}


def atomic_number(symbol: str) -> int:
    """Z of an element symbol. Raises UserError for anything else."""
    if symbol not in ATOMIC_NUMBERS:
        raise UserError(f"'{symbol}' is not an element symbol")
    return ATOMIC_NUMBERS[symbol]
