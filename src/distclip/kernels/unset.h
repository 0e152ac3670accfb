/* Ends an instruction set: its names are free for the next one. */
#undef SET
#undef ATTRIBUTE
#undef WIDTH
#undef INLINE
#undef doubles
#undef longs
#undef unsigned_longs
#undef floats
#undef words
#undef numbers
#undef doubles_stored
#undef floats_stored
#undef words_stored
