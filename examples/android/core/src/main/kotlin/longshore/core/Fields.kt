/** Reads the fields of a JSON object by name, type and bound; a field that nobody asked for is an error. */
package longshore.core

class Fields(val name: String, value: Any?) {
    private val values: Map<*, *> = value as? Map<*, *> ?: fault("is not an object")
    private val asked = HashSet<String>()

    /** What `build` makes of the fields; afterwards none may be left over. */
    fun <T> read(build: Fields.() -> T): T {
        val result = build(this)
        val unknown = values.keys.firstOrNull { it !in asked }
        return if (unknown == null) result else fault("has an unknown field $unknown")
    }

    fun text(field: String, maxChars: Int, form: Regex? = null): String {
        val found = anyText(field, maxChars)
        if (found == "" || (form != null && !form.matches(found))) fault("$field can't be ${found.take(40)}")
        return found
    }

    fun anyText(field: String, maxChars: Int = 1000): String {
        val found = get(field) as? String ?: fault("$field must be text")
        return if (found.codePointCount(0, found.length) <= maxChars) found else fault("$field is too long")
    }

    fun textOr(field: String, otherwise: String, maxChars: Int, form: Regex? = null): String =
        if (has(field)) anyText(field, maxChars).also {
            if (form != null && !form.matches(it)) fault("$field can't be ${it.take(40)}")
        } else otherwise

    fun textOrNull(field: String, maxChars: Int): String? = if (get(field) == null) null else anyText(field, maxChars)

    fun long(field: String, range: LongRange): Long = checked(field, get(field), range)

    fun int(field: String, most: Int): Int = long(field, 1L..most.toLong()).toInt()

    fun longOr(field: String, otherwise: Long, range: LongRange): Long =
        if (has(field)) long(field, range) else otherwise

    fun longOrNull(field: String, range: LongRange): Long? = if (get(field) == null) null else long(field, range)

    fun longs(field: String, counts: IntRange, range: LongRange): List<Long> =
        items(field, counts).map { checked(field, it, range) }

    fun textsOr(field: String, most: Int, form: Regex): List<String> =
        if (!has(field)) emptyList() else items(field, 0..most).map {
            if (it is String && form.matches(it)) it else fault("$field holds a bad entry")
        }

    fun <T> list(field: String, counts: IntRange, build: (Fields) -> T): List<T> =
        items(field, counts).mapIndexed { index, item -> build(Fields("$name.$field[$index]", item)) }

    fun <T> listOr(field: String, most: Int, build: (Fields) -> T): List<T> =
        if (has(field)) list(field, 0..most, build) else emptyList()

    fun child(field: String): Fields = Fields("$name.$field", get(field))

    fun childOrNull(field: String): Fields? = if (get(field) == null) null else child(field)

    fun objectOrNull(field: String) {
        if (has(field) && get(field) !is Map<*, *>) fault("$field must be an object")
    }

    /** Every field as an object of its own. */
    fun each(most: Int): List<Fields> {
        if (values.size > most) fault("has too many fields")
        return values.map { Fields(it.key as String, it.value) }
    }

    private fun items(field: String, counts: IntRange): List<*> {
        val found = get(field) as? List<*> ?: fault("$field must be a list")
        return if (found.size in counts) found else fault("$field has ${found.size} entries")
    }

    private fun checked(field: String, value: Any?, range: LongRange): Long {
        val found = value as? Long ?: fault("$field must be a whole number")
        return if (found in range) found else fault("$field must not be $found")
    }

    private fun has(field: String): Boolean {
        asked.add(field)
        return values.containsKey(field)
    }

    private fun get(field: String): Any? {
        asked.add(field)
        return values[field]
    }

    private fun fault(message: String): Nothing = throw BundleDamaged("$name $message")
}
