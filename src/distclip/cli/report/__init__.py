"""`distclip report`: a page with figures of one or several runs."""
