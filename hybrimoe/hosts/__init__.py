"""Other people's llama.cpp programs with the plug-in: what a program is, what its arguments say, how it is started."""
