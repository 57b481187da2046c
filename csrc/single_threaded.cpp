// libstdc++'s shared_ptr reads a variable that glibc has since 2.32. This one, which says that there are threads, takes
// its place, so that the library loads where glibc is older.
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;
