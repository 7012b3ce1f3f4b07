"""The invented world of the newsroom: its people, places, days and numbers.

Values of one type are interchangeable: the generator draws them alike, so that a fact can be swapped for another of its type and the article stays
as likely as before. No count is below 30, so that no count is ever the day of a date. All names are made up or common to many.
"""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST_NAMES = _words(
    """
    Adela Alan Anna Arthur Beatrice Boris Carla Cedric Clara Colin Dana Daniel Diana Edgar Elena Emil Erik Esther Felix Fiona Frank George Greta
    Hanna Hector Helen Hugo Ida Irene Ivan Jacob Jane Jonas Julia Karl Laura Leo Linda Louis Lucy Marco Maria Martin Mona Nadia Nina Oliver Olga
    Oscar Paul Petra Philip Rosa Ruth Samuel Sara Simon Sofia Teresa Thomas Vera Victor Walter Yusuf
    """
)

LAST_NAMES = _words(
    """
    Abbott Adler Barrow Becker Bishop Bolton Brandt Carver Castle Collins Costa Cross Dalton Decker Dixon Duarte Ellis Farrow Fischer Foster
    Garner Gibson Grant Haddad Hale Hansen Harper Hayes Holt Hudson Ibarra Irwin Jensen Kaplan Keller Kemp Lambert Larsen Lowell Mason Mercer
    Miller Moreno Morris Nolan Novak Olsen Ortega Osman Parker Patel Pereira Porter Quinn Ramos Reed Rivera Rossi Sawyer Silva Simmons Sutton
    Tanaka Thorne Torres Turner Vargas Vogel Wagner Walsh Weber Winter Yates Zeller
    """
)

PLACES = _words(
    """
    Aldermere Ashford Barlow Belmont Birchwood Bramley Brookside Carrick Cedarville Clayton Corwin Dunmore Eastvale Edgewater Elmhurst Fairhaven
    Fenwick Foxbridge Glenmore Graypool Hartwell Hawkridge Hazelton Hillcrest Ironbridge Kelford Kingsmere Lakeside Langdon Larkspur Linden
    Littlebrook Maplewood Marlow Meadowlark Millbrook Netherby Northgate Oakham Oldbury Pinehurst Queensport Ravenna Redcliff Ridgeway Riverton
    Rockport Rosedale Saltmarsh Sandford Shelby Silverton Southwick Stonefield Summerton Tarrant Thornbury Underhill Westbrook Whitcombe Wickham
    Willowdale Winfield Woodstock
    """
)

WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December")
DATES = tuple(f"{month} {day}" for month in MONTHS for day in range(2, 29))

# every number of a type should be alike; with more of them the small tokenizer would cut some in two
COUNTS = tuple(str(count) for count in (*range(30, 100), *range(110, 400, 10)) if count % 100)
