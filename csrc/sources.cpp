// What the library was built from, for merv_fast/ops/_native.py to compare with the sources of a checkout.
#define QUOTED(text) #text
#define QUOTE(macro) QUOTED(macro)

extern "C" __attribute__((visibility("default"), used)) const char merv_fast_sources[] = QUOTE(MERV_FAST_SOURCES);
