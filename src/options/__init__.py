"""What the options of main.py are made of; `option` reads a command line by them."""
