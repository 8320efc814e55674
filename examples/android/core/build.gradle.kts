plugins { kotlin("jvm") }

// The language of Debian's compiler, which the tests use: nothing here needs a newer one.
kotlin { jvmToolchain(17) }

// The golden vectors are a program, not a test class, so that they run without a build tool as well.
val golden = tasks.register<JavaExec>("golden") {
    mainClass.set("longshore.core.GoldenVectorsKt")
    classpath = sourceSets["test"].runtimeClasspath
    args("$rootDir/golden", "$rootDir/../models/shop-student/tokenizer.json")
}

tasks.named("check") { dependsOn(golden) }
