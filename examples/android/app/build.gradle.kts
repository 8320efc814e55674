plugins {
    id("com.android.application")
    kotlin("android")
}

android {
    namespace = "longshore.app"
    compileSdk = 36

    defaultConfig {
        applicationId = "longshore.app"
        minSdk = 24
        targetSdk = 36
        versionCode = 1
        versionName = "0.1.0"
        // Where the bundle comes from and whose signature counts; set them in local gradle.properties.
        buildConfigField("String", "EDGE_URL", quoted("longshore.edgeUrl", "http://10.0.2.2:8080"))
        buildConfigField("String", "API_KEY", quoted("longshore.apiKey", "test-key"))
        buildConfigField("String", "KEY_ID", quoted("longshore.keyId", ""))
        buildConfigField("String", "PUBLIC_KEY", quoted("longshore.publicKey", ""))
    }

    buildFeatures { buildConfig = true }
    compileOptions {
        sourceCompatibility = JavaVersion.VERSION_17
        targetCompatibility = JavaVersion.VERSION_17
    }
}

fun quoted(name: String, otherwise: String): String = "\"${findProperty(name) ?: otherwise}\""

dependencies {
    implementation(project(":core"))
    implementation("com.microsoft.onnxruntime:onnxruntime-android:1.24.3")
}
