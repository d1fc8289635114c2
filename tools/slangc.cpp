// The part of slangc's command line that kernels/build.sh needs, over the library that the PyPI wheel `slangpy` brings:
//   slangc FILE -target spirv|cuda -profile NAME [-DNAME=VALUE]... -o OUT     or     slangc -v
#include "slang.h"

#include <cstdio>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

template <class T> struct Ref {
    T *p = nullptr;
    T **out() { return &p; }
    T *operator->() { return p; }
};

static bool say(slang::IBlob *blob) {
    if (blob) fprintf(stderr, "%s\n", (const char *)blob->getBufferPointer());
    return blob != nullptr;
}

int main(int argc, char **argv) {
    Ref<slang::IGlobalSession> global;
    slang::createGlobalSession(global.out());
    std::string file, target = "spirv", profile = "spirv_1_5", output;
    std::vector<std::string> words;
    for (int i = 1; i < argc; i++) {
        std::string a = argv[i];
        if (a == "-v") { printf("%s\n", global->getBuildTagString()); return 0; }
        if (i + 1 < argc && a == "-target") target = argv[++i];
        else if (i + 1 < argc && a == "-profile") profile = argv[++i];
        else if (i + 1 < argc && a == "-o") output = argv[++i];
        else if (i + 1 < argc && a == "-warnings-disable") i++; // warnings go to standard error, and fail nothing
        else if (a.rfind("-D", 0) == 0 && a.size() > 2) words.push_back(a.substr(2));
        else file = a;
    }
    std::vector<slang::PreprocessorMacroDesc> macros;
    std::vector<std::string> values(words.size());
    for (size_t i = 0; i < words.size(); i++) {
        size_t at = words[i].find('=');
        values[i] = at == std::string::npos ? "1" : words[i].substr(at + 1);
        words[i] = words[i].substr(0, at);
    }
    for (size_t i = 0; i < words.size(); i++) macros.push_back({words[i].c_str(), values[i].c_str()});

    slang::TargetDesc t = {};
    t.format = target == "cuda" ? SLANG_CUDA_SOURCE : SLANG_SPIRV;
    t.profile = global->findProfile(profile.c_str());
    slang::SessionDesc s = {};
    s.targets = &t;
    s.targetCount = 1;
    s.preprocessorMacros = macros.data();
    s.preprocessorMacroCount = (SlangInt)macros.size();
    Ref<slang::ISession> session;
    global->createSession(s, session.out());
    Ref<slang::IBlob> notes, code;
    Ref<slang::IModule> module;
    module.p = session->loadModule(file.c_str(), notes.out());
    say(notes.p);
    if (!module.p) return 1;
    Ref<slang::IEntryPoint> entry;
    module->findEntryPointByName("main", entry.out());
    slang::IComponentType *parts[] = {module.p, entry.p};
    Ref<slang::IComponentType> program, linked;
    session->createCompositeComponentType(parts, 2, program.out(), notes.out());
    program->link(linked.out(), notes.out());
    linked->getEntryPointCode(0, 0, code.out(), notes.out());
    if (!code.p) { say(notes.p); return 2; }
    std::ofstream(output, std::ios::binary).write((const char *)code->getBufferPointer(), (std::streamsize)code->getBufferSize());
    return 0;
}
