extern "C" int planted_nothing() { return 0; }
